"""Saved caches: what goes in comes out to the bit, and damage or a wrong owner is refused."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import select
from mlx_kvret.core.snapshot import Snapshot, WindowShape, read_snapshot, write_snapshot
from mlx_kvret.core.tensors import FLOATS, Tensor, read_file, write_tensors
from mlx_kvret.errors import CheckpointError, ConfigError, ModelMismatchError

MODEL, GATES = "hidden_size=64 num_hidden_layers=2 head_dim=4 rope_theta=1e+06", "0123456789ab"


def snapshot(held=((0, 3, 4), (), (4,), (1, 2, 4)), *, kv_heads=2, seen=5, dtype="BF16", **changes):
    """Positions held by each flat head, with random contents."""
    rng = np.random.default_rng(0)
    position = np.concatenate([np.array(p, np.int32) for p in held])
    parts = {
        "model": MODEL,
        "gates": GATES,
        "eviction": EvictionConfig(4, 2, lookahead=3),
        "seen": seen,
        "counts": np.array([len(p) for p in held], np.int32).reshape(-1, kv_heads),
        "position": position,
        "retention": -rng.exponential(size=len(position)).astype(np.float32),
        "keys": Tensor.of(rng.normal(size=(len(position), 6)), dtype),
        "values": Tensor.of(rng.normal(size=(len(position), 4)), dtype),
        "extras": {
            3: {"keys": Tensor.of(rng.normal(size=(2, 2, 3)), "F16"), "a.b": Tensor.of(np.int32(9), "I32")}
        },
        "notes": {"messages": json.dumps([{"role": "user", "content": "β?"}])},
    }
    return Snapshot(**parts | changes)


def same(one, other):
    for field in dataclasses.fields(Snapshot):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape and a.bits.tobytes() == b.bits.tobytes()
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        elif field.name != "extras":
            assert a == b
    assert one.extras.keys() == other.extras.keys()
    for layer, state in one.extras.items():
        assert state.keys() == other.extras[layer].keys()
        assert all(t.bits.tobytes() == other.extras[layer][n].bits.tobytes() for n, t in state.items())


@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip(tmp_path, dtype):
    saved = snapshot(dtype=dtype)
    write_snapshot(tmp_path / "a.kvret", saved)
    same(read_snapshot(tmp_path / "a.kvret"), saved)
    assert [p.name for p in tmp_path.iterdir()] == ["a.kvret"]


@pytest.mark.parametrize(
    "saved",
    [
        snapshot([(), ()], kv_heads=1, seen=0, extras={}, notes={}),
        snapshot([(0,)], kv_heads=1, seen=1),
        snapshot([range(50)] * 2, seen=50, eviction=EvictionConfig(1, 0, policy="full"), gates=""),
        snapshot(retention=np.float32([0, -3e38, -1e-45, -1, -2, -3, -4])),
    ],
    ids=["empty", "one token", "full", "extreme log β"],
)
def test_round_trip_of_odd_ones(tmp_path, saved):
    write_snapshot(tmp_path / "a", saved)
    same(read_snapshot(tmp_path / "a"), saved)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 4))
def test_any_selection_can_be_saved(tmp_path_factory, seen, layers, kv_heads, budget, buffer):
    config = EvictionConfig(budget, buffer)
    rng = np.random.default_rng(seen)
    head, position = np.divmod(np.arange(layers * kv_heads * seen), seen)
    keep = select(rng.normal(size=len(head)), position, head, seen, config, layers, kv_heads)
    held = [position[keep & (head == h)] for h in range(layers * kv_heads)]
    saved = snapshot(held, kv_heads=kv_heads, seen=seen, eviction=config)
    path = tmp_path_factory.mktemp("snapshot") / "a"
    write_snapshot(path, saved)
    found = read_snapshot(path)
    assert list(zip(found.head, found.position, strict=True)) == list(
        zip(head[keep], position[keep], strict=True)
    )


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 9])
def test_recent_tokens_that_all_heads_hold(limit):
    assert snapshot([(0, 2, 3), (2, 3), (1, 2, 3), (2, 3)], seen=4).recent(limit) == min(limit, 2)
    assert snapshot([(0, 2, 3), (2,), (1, 2, 3), (2, 3)], seen=4).recent(limit) == 0
    assert snapshot([(0, 1), (0, 1)], seen=2).recent(limit) == min(limit, 2)
    assert snapshot([(), ()], seen=0).recent(limit) == 0


def test_other_libraries_open_it(tmp_path):
    saved = snapshot()
    write_snapshot(tmp_path / "a", saved)
    tensors = safetensors.torch.load_file(tmp_path / "a")
    assert tensors["keys"].dtype == torch.bfloat16 and tensors["counts"].tolist() == [[3, 0], [1, 3]]
    np.testing.assert_array_equal(tensors["keys"].float().numpy(), saved.keys.float32())


def test_the_owner_may_go_on():
    saved = snapshot()
    saved.check(MODEL, GATES, saved.eviction)
    saved.check(
        "hidden_size=64 intermediate_size=128", GATES, saved.eviction
    )  # fields that one lacks do not count
    snapshot(eviction=EvictionConfig(4, 2, policy="recent")).check(
        MODEL, "other gates", EvictionConfig(4, 2, policy="recent")
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": MODEL.replace("64", "128")}, "hidden_size is 128, expected 64"),
        ({"gates": "ffffffffffff"}, "the gates are ffffffffffff, expected 0123456789ab"),
        ({"gates": ""}, "the gates are missing, expected 0123456789ab"),
        ({"eviction": EvictionConfig(5, 2, lookahead=3)}, "budget is 5, expected 4"),
        ({"eviction": EvictionConfig(4, 2)}, "lookahead is 1, expected 3"),
        ({"eviction": EvictionConfig(4, 2, "head", lookahead=3)}, "scope is head, expected global"),
    ],
)
def test_others_may_not(change, expected):
    saved = snapshot()
    with pytest.raises(ModelMismatchError, match=f"{expected}; give the model, gates and options"):
        saved.check(**{"model": MODEL, "gates": GATES, "eviction": saved.eviction} | change)


def test_everything_that_differs_is_named():
    with pytest.raises(ModelMismatchError, match=r"hidden_size.*gates.*budget.*buffer.*window"):
        snapshot().check("hidden_size=1", "", EvictionConfig(9, 1, window=1, lookahead=3))


def ints(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"counts": ints([3, 0], [1, 2])}, "position has shape .7,., the counts add up to 6"),
        ({"counts": ints([3, 0], [1, 2**31 - 1])}, "the counts add up to 2147483651"),
        ({"counts": ints([3, -1], [1, 4])}, "a head has -1 entries"),
        ({"counts": ints(3, 0, 1, 3)}, r"counts has shape .4,., expected \(L, H\)"),
        ({"counts": ints([3, 1], [0, 3]), "position": ints(0, 3, 4, 9, 1, 2, 4)}, "outside of the 5 tokens"),
        ({"counts": ints([4, 0], [0, 3])}, "the positions of a head do not rise"),
        ({"counts": np.int64([[3, 0], [1, 3]])}, "counts is int64, expected int32"),
        ({"counts": np.zeros((0, 2), np.int32)}, "counts has shape"),
        ({"position": ints(0, 3, 4, 4, 1, 2, -1)}, "outside of the 5 tokens seen"),
        ({"position": ints(3, 0, 4, 4, 1, 2, 4)}, "do not rise"),
        ({"position": ints(3, 3, 4, 4, 1, 2, 4)}, "do not rise"),
        ({"position": np.arange(7)}, "position is int64"),
        ({"seen": 4}, "outside of the 4 tokens seen"),
        ({"seen": -1}, "seen is -1"),
        ({"seen": 2**31}, "seen is 2147483648"),
        ({"retention": np.zeros(6, np.float32)}, "retention has shape"),
        ({"retention": np.zeros(7)}, "retention is float64"),
        ({"retention": np.full(7, 0.1, np.float32)}, "log β is above 0"),
        ({"retention": np.full(7, np.nan, np.float32)}, "retention holds NaN or infinity"),
        ({"retention": np.full(7, -np.inf, np.float32)}, "retention holds NaN or infinity"),
        *(
            ({name: Tensor.of(np.full((7, width), bad), dtype)}, f"{name} holds NaN or infinity")
            for name, width in (("keys", 6), ("values", 4))
            for dtype in FLOATS
            for bad in (np.nan, np.inf, -np.inf)
        ),
        ({"extras": {3: {"keys": Tensor.of(np.full((2, 2, 3), np.nan))}}}, "keys of layer 3 holds NaN"),
        ({"keys": Tensor.of(np.zeros((6, 6)))}, "keys has shape .6, 6., the counts add up to 7"),
        ({"keys": Tensor.of(np.zeros(7))}, "keys has shape .7,."),
        ({"values": Tensor.of(np.zeros((7, 4)), "I32")}, "values is I32, expected one of F32, BF16, F16"),
        ({"eviction": EvictionConfig(1, 0)}, "4 heads hold 7 entries, budget and buffer allow 4"),
        ({"eviction": EvictionConfig(1, 1, "head")}, "1 heads hold 3 entries, budget and buffer allow 2"),
        ({"gates": None}, "gates is None, expected a text"),
        ({"gates": ""}, "the policy is 'learned' and its gates are not named"),
        ({"notes": {"turns": 3}}, "turns is 3, expected a text"),
        ({"notes": {"context": "a\ud800"}}, "context holds half a character"),
        ({"extras": {0: {"": Tensor.of(np.zeros(1))}}}, "no name or no layer"),
    ],
)
def test_contradictions(changes, expected):
    with pytest.raises(CheckpointError, match=expected):
        snapshot(**changes)


def rewrite(path, metadata=None, **tensors):
    """Change a file's header texts and tensors; None drops one."""
    old_tensors, old_metadata = read_file(path)
    tensors, metadata = old_tensors | tensors, old_metadata | (metadata or {})
    write_tensors(
        path,
        {name: t for name, t in tensors.items() if t is not None},
        {name: text for name, text in metadata.items() if text is not None},
    )


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        ({"format": "mlx"}, {}, "is no saved cache: its format is 'mlx', expected 'kvret-snapshot'"),
        ({"format": None}, {}, "its format is None"),
        ({"version": "2"}, {}, "has version '2'; this release reads version '1'; update mlx-kvret"),
        ({"version": None}, {}, "has version None"),
        ({"model": None}, {}, "lacks 'model'; copy it or save it again"),
        ({"eviction": None}, {}, "lacks 'eviction'"),
        ({"eviction": "{"}, {}, "is damaged"),
        ({"eviction": "[]"}, {}, r"its header holds \[\], expected a JSON object"),
        ({"eviction": "[" * 100_000}, {}, "is damaged"),
        ({"eviction": '{"budget": 0}'}, {}, "is damaged: budget is 0"),
        ({"notes": '"hello"'}, {}, "its header holds .hello., expected a JSON object"),
        ({"seen": "many"}, {}, "is damaged: .*'many'"),
        ({"seen": "9" * 5000}, {}, "is damaged"),
        *(({"seen": text}, {}, "is damaged: seen is") for text in (" 5", "05", "+5", "1_0", "٥", "5.0", "")),
        ({"eviction": '{"budget": true}'}, {}, "is damaged: budget is True"),
        ({"eviction": '{"buffer": 1e10}'}, {}, "is damaged: buffer is 1"),
        ({"eviction": '{"buffer": 10000000000}'}, {}, "is damaged: buffer is 1"),
        ({"eviction": '{"budget": 4, "buffer": 2, "threshold": NaN}'}, {}, "is damaged: NaN is no number"),
        ({"eviction": '{"budget": 4, "budget": 5}'}, {}, "stands more than once"),
        ({"eviction": '{"budget": ' + "9" * 400 + "}"}, {}, "is damaged: the number 9"),
        ({"notes": '{"said": "\\ud800"}'}, {}, "half a character"),
        ({"seen": "3"}, {}, "is damaged: there are positions outside of the 3 tokens"),
        ({}, {"counts": None}, "lacks 'counts'"),
        ({}, {"values": None}, "lacks 'values'"),
        ({}, {"counts": Tensor.of([[3, 0], [3, 3]], "I32")}, "is damaged: position has shape"),
        ({}, {"counts": Tensor.of([[3, 0], [1, 3]], "U32")}, "is damaged: counts is uint32"),
        ({}, {"queries": Tensor.of([1.0])}, "there is an unknown tensor queries"),
        ({}, {"extra.one.keys": Tensor.of([1.0])}, "there is an unknown tensor extra.one.keys"),
        ({}, {"extra.1": Tensor.of([1.0])}, "there is an unknown tensor extra.1"),
        ({}, {"extra.01.keys": Tensor.of([1.0])}, "there is an unknown tensor extra.01"),
        ({}, {"extra.²": Tensor.of([1.0])}, "there is an unknown tensor extra"),
    ],
)
def test_damaged_files(tmp_path, metadata, tensors, expected):
    path = tmp_path / "a.kvret"
    write_snapshot(path, snapshot())
    rewrite(path, metadata, **tensors)
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_snapshot(path)
    assert "a.kvret" in str(caught.value)


def test_every_truncation_is_noticed(tmp_path):
    write_snapshot(tmp_path / "whole", snapshot())
    content = (tmp_path / "whole").read_bytes()
    for size in range(len(content)):
        (tmp_path / "part").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="part"):
            read_snapshot(tmp_path / "part")


def test_every_changed_byte_is_noticed(tmp_path):
    """By the checksum, over tensors and texts, where nothing else does; the header's padding says nothing."""
    write_snapshot(tmp_path / "whole", snapshot())
    content = (tmp_path / "whole").read_bytes()
    text = content[: 8 + int.from_bytes(content[:8], "little")].rstrip()
    for place in [*range(8, len(text)), *range(len(text) + 8, len(content))]:
        changed = bytearray(content)
        changed[place] ^= 0x01
        (tmp_path / "changed").write_bytes(changed)
        try:
            same(read_snapshot(tmp_path / "changed"), snapshot())
        except CheckpointError:
            continue
        # the name of the checksum itself: a file without one is another program's
        assert b'"checksum"' not in changed


def test_a_huge_buffer_costs_nothing():
    saved = snapshot([(0, 1, 2), (1, 2)], kv_heads=1, seen=3, eviction=EvictionConfig(4, 2**31 - 1))
    assert saved.recent(2**31 - 1) == 2


def test_a_saved_cache_is_its_owner_s_alone(tmp_path):
    (tmp_path / "there").touch()
    (tmp_path / "there").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "target")
    (tmp_path / "far").mkdir()
    for name in ("new", "there", "link"):
        write_snapshot(tmp_path / name, snapshot())
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("new", "there", "far/target")}
    assert modes == {"new": 0o600, "there": 0o640, "far/target": 0o600}
    assert (tmp_path / "link").is_symlink()


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_snapshot(tmp_path / "absent")
    safetensors.torch.save_file({"keys": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is no saved cache"):
        read_snapshot(tmp_path / "other")


def test_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_snapshot(path, snapshot())
    before = path.read_bytes()

    def full_disk(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_kvret.core.snapshot.write_tensors", full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_snapshot(path, snapshot(seen=6))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_layers_that_are_not_the_model_s_are_refused():
    shape = CacheShape(layers=2, kv_heads=2, key_dim=6, value_dim=4, hidden_size=64, itemsize=2)
    snapshot().check_shape(shape, [3])
    with pytest.raises(CheckpointError, match=r"\(2, 2, 6, 4\), the model \(3, 2, 6, 4\)"):
        snapshot().check_shape(dataclasses.replace(shape, layers=3), [3])
    with pytest.raises(CheckpointError, match="lacks layer 1, which is not bounded"):
        snapshot().check_shape(shape, [1, 3])
    with pytest.raises(CheckpointError, match="holds a state for layer 3, which has none"):
        snapshot().check_shape(shape, [])
    # an empty cache has nothing to save of them
    snapshot([(), (), (), ()], seen=0, extras={}, notes={}).check_shape(shape, [1])


def window(shape=(2, 5, 3), values=(2, 5, 3), dtype="F32", **more):
    parts = {"keys": Tensor.of(np.zeros(shape), dtype), "values": Tensor.of(np.zeros(values), dtype), **more}
    return {3: {name: tensor for name, tensor in parts.items() if tensor is not None}}


@pytest.mark.parametrize(
    ("extras", "size", "expected"),
    [
        (window(), 4, None),
        (window((2, 4, 3), (2, 4, 3)), 4, None),
        (window((2, 3, 3), (2, 3, 3)), 4, r"keys of shape \(2, 3, 3\), expected \(2, 4 to 5, 3\)"),
        (window((2, 6, 3), (2, 6, 3)), 9, "keys of shape"),
        (window((2, 4, 3)), 4, "values of shape"),
        (window((1, 5, 3)), 4, "keys of shape"),
        (window(values=(2, 5, 4)), 4, "values of shape"),
        (window((2, 5, 3, 1)), 4, "keys of shape"),
        (window(dtype="I32"), 4, "keys of type I32"),
        (window(values=(2, 5, 3), more=Tensor.of(np.zeros(1))), 4, "holds keys, more, values"),
        (window(keys=None), 4, "holds values"),
        ({}, 4, "holds nothing"),
    ],
)
def test_windows_are_those_of_the_model(extras, size, expected):
    saved, shape = snapshot(extras=extras), WindowShape(2, 3, 3)
    if expected is None:
        assert saved.window(3, size, shape) is extras[3]
    else:
        with pytest.raises(CheckpointError, match=expected):
            saved.window(3, size, shape)
