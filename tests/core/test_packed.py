"""Saved caches in few bits: to the bit what was saved, and refused where the parts contradict each other."""

import dataclasses
import json

import numpy as np
import pytest

from mlx_kvret.core.bits import packings
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.packed import Packed
from mlx_kvret.core.snapshot import Snapshot, read_snapshot, write_snapshot
from mlx_kvret.core.tensors import Tensor, read_file, write_tensors
from mlx_kvret.errors import CheckpointError, ModelMismatchError

from .test_snapshot import GATES, MODEL

HELD = ((0, 3, 4, 5), (4, 5), (2, 4, 5), (4, 5))
SIZE = 64, 32


def snapshot(bits="k8v4", dtype="BF16", scale=1.0, newest=2, **changes):
    """Two layers of two heads that hold HELD of 6 tokens, the ``newest`` not packed."""
    rng = np.random.default_rng(0)
    position = np.concatenate([np.array(p, np.int32) for p in HELD])
    fresh = position >= 6 - newest
    pair = [Tensor.of(rng.normal(size=(len(position), width)) * scale, dtype) for width in SIZE]
    new, old = ([Tensor(dtype, t.bits[which]) for t in pair] for which in (fresh, ~fresh))
    forms = packings(bits, *SIZE)
    rows = [Tensor("U32", form.pack(t)) for form, t in zip(forms, old, strict=True)]
    parts = {
        "model": MODEL,
        "gates": GATES,
        "eviction": EvictionConfig(4, 2, kv_bits=bits),
        "seen": 6,
        "counts": np.array([[4, 2], [3, 2]], np.int32),
        "position": position,
        "retention": -rng.exponential(size=len(position)).astype(np.float32),
        "keys": new[0],
        "values": new[1],
        "packed": Packed.of(*rows, newest, bits, SIZE),
    }
    return Snapshot(**parts | changes)


@pytest.mark.parametrize("bits", [8, "k8v4", 4])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("newest", [0, 1, 2])
def test_round_trip(tmp_path, bits, dtype, newest):
    made = snapshot(bits, dtype, newest=newest)
    write_snapshot(tmp_path / "c", made)
    found = read_snapshot(tmp_path / "c")
    assert found.eviction == made.eviction and found.recent(5) == newest
    for name in ("keys", "values"):
        for one, other in ((found, made), (found.packed, made.packed)):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype and a.shape == b.shape and a.bits.tobytes() == b.bits.tobytes()
    said = json.loads(read_file(tmp_path / "c")[1]["packing"])
    keys, values = packings(bits, *SIZE)
    assert said == {
        "keys": {"bits": keys.bits, "group": 64},
        "values": {"bits": values.bits, "group": 32},
        "window": newest,
    }


def test_other_bits_are_refused():
    made = snapshot()
    made.check(MODEL, GATES, made.eviction)
    for bits in (None, 8):
        with pytest.raises(ModelMismatchError, match=f"kv_bits is {bits}, expected k8v4"):
            made.check(MODEL, GATES, dataclasses.replace(made.eviction, kv_bits=bits))


def test_into_another_float_type():
    made = snapshot(dtype="BF16")
    wide = made.cast("F32")
    form = made.packed.forms[0]
    assert wide.packed.keys.shape == (3, form.words(4)) and wide.keys.dtype == "F32"
    old = form.unpack(made.packed.keys.bits, "BF16").float32()
    # a step of 8 bits is .02 of these values, and scales rounded to bfloat16 move the largest by as much
    np.testing.assert_allclose(form.unpack(wide.packed.keys.bits, "F32").float32(), old, atol=0.04)
    with pytest.raises(ModelMismatchError, match="too large"):
        snapshot(dtype="BF16", scale=1e30).cast("F16")


def _changed(made, **changes):
    return dataclasses.replace(made, packed=dataclasses.replace(made.packed, **changes))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: _changed(s, newest=1), "keys has shape"),
        (lambda s: _changed(s, keys=Tensor("U32", s.packed.keys.bits[:-1])), "packed_keys is U32 of shape"),
        (lambda s: _changed(s, values=Tensor("U32", s.packed.values.bits[:, :-1])), "packed_values"),
        (lambda s: _changed(s, keys=Tensor.of(s.packed.keys.bits, "F32")), "packed_keys is F32"),
        (lambda s: _changed(s, keys=Tensor("U32", s.packed.keys.bits | 0x7F80)), "packed_keys holds NaN"),
        (lambda s: dataclasses.replace(s, packed=None), "keys has shape"),
        (lambda s: dataclasses.replace(s, eviction=EvictionConfig(4, 2)), "kv_bits is None"),
        (lambda s: dataclasses.replace(s, eviction=EvictionConfig(5, 1, kv_bits="k8v4")), "its buffer 1"),
        (lambda s: dataclasses.replace(s, values=s.values.cast("F16")), "two types"),
        (lambda s: snapshot(newest=3), "keys has shape"),
    ],
)
def test_contradictions(change, expected):
    with pytest.raises(CheckpointError, match=expected):
        change(snapshot())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t, m: m.pop("packing"), "lacks 'packing'"),
        (lambda t, m: t.pop("packed_values"), "lacks 'packed_values'"),
        (lambda t, m: m.update(packing="[]"), "without the tokens of its window"),
        (lambda t, m: m.update(packing="{}"), "without the tokens of its window"),
        (
            lambda t, m: m.update(packing=m["packing"].replace('"window": 2', '"window": true')),
            "without the tokens",
        ),
        (lambda t, m: m.update(packing=m["packing"].replace('"group": 64', '"group": 32')), "its packing is"),
        (lambda t, m: m.update(packing=m["packing"].replace('"bits": 4', '"bits": 8')), "its packing is"),
        (lambda t, m: m.update(eviction=json.dumps(EvictionConfig(4, 2).to_dict())), "kv_bits does not say"),
        (lambda t, m: m.update(eviction=m["eviction"].replace("k8v4", "k8v5")), "kv_bits is 'k8v5'"),
    ],
)
def test_damage(tmp_path, change, expected):
    write_snapshot(tmp_path / "c", snapshot())
    tensors, metadata = read_file(tmp_path / "c")
    change(tensors, metadata)
    write_tensors(tmp_path / "d", tensors, metadata)
    with pytest.raises(CheckpointError, match=expected):
        read_snapshot(tmp_path / "d")
