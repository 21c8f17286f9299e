"""Torch files read without torch: as torch reads them, or refused."""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.converters.torch_file import read_state
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import CheckpointError

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def same(found: dict[str, Tensor], state) -> None:
    assert list(found) == list(state)
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        assert (found[name].dtype, found[name].shape) == (CODES[tensor.dtype], tuple(tensor.shape))
        bits = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
        assert found[name].bits.tobytes() == bits.tobytes()


def states():
    base = torch.randn(4, 6)
    for dtype in CODES:
        yield {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(2).to(dtype)}
    yield {"rows": base[1:3], "columns": base[:, 2:4], "turned": base.T, "steps": base[::2, ::3], "all": base}
    yield {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "spread": torch.ones(1, 4).expand(1, 4)}
    yield {"parameter": torch.nn.Parameter(torch.ones(3)), "half": torch.ones(2, dtype=torch.float16)}
    yield torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).bfloat16().state_dict()
    yield collections.OrderedDict(x=torch.randn(300, 300))
    yield {}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("index", range(len(list(states()))))
def test_equal_to_torch(tmp_path, index, zipped):
    torch.manual_seed(0)
    state = list(states())[index]
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    same(read_state(tmp_path / "w.pth"), torch.load(tmp_path / "w.pth", weights_only=True))


def pickled(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tensor(count=6, offset=0, shape=(2, 3), strides=(3, 1), key="0"):
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count)
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + number(offset)
    return view + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"


def archive(path, pickle_: bytes, compression=zipfile.ZIP_STORED, **records: bytes):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle_)
        file.writestr("archive/data/0", bytes(24))
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)
    return path


def one(value: bytes) -> bytes:
    return pickled(b"}", text("a"), value, b"s")


def test_the_handmade_file_is_one_that_torch_reads(tmp_path):
    made = archive(tmp_path / "w", one(tensor()), version=b"3\n", byteorder=b"little")
    same(read_state(made), torch.load(made, weights_only=True))
    assert read_state(made)["a"].shape == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 7}, {"count": 2**61}, {"count": -1}, {"offset": 1}, {"offset": -1}, {"offset": 2**40},
        {"shape": (3, 3)}, {"shape": (2, -3)}, {"shape": (2**40, 2**40)}, {"shape": (2,)},
        {"strides": (4, 1)}, {"strides": (-3, 1)}, {"strides": (2**62, 1)}, {"strides": (3,)},
        {"shape": (0, 3), "offset": 7}, {"shape": (1,) * 40, "strides": (1,) * 40}, {"key": "1"},
        {"key": "../data.pkl"}, {"key": ""},
    ],
    ids=str,
)  # fmt: skip
def test_tensors_beyond_their_storage(tmp_path, changes):
    with pytest.raises(CheckpointError, match="download it again"):
        read_state(archive(tmp_path / "w", one(tensor(**changes))))


def test_many_copies_of_one_storage(tmp_path):
    turned = tensor(shape=(3, 2), strides=(1, 3))
    bomb = pickled(b"}(", *(text(str(i)) + turned for i in range(4000)), b"u")
    state = read_state(archive(tmp_path / "w", bomb))  # the names take more room than the tensors
    assert len(state) == 4000
    path = archive(tmp_path / "v", pickled(
        b"}(", text("a"), tensor(4096**2, 0, (4096, 4096), (1, 4096)), text("b"),
        tensor(4096**2, 0, (4096, 4095), (1, 4096)), b"u",
    ))  # fmt: skip
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/00", b"")
    with pytest.raises(CheckpointError, match="claims more values"):
        read_state(path)


MANY = b"(" * 100_000 + b"t" * 100_000


@pytest.mark.parametrize(
    ("pickle_", "says"),
    [
        (one(b"cos\nsystem\n(" + text("true") + b"tR"), "asks for os.system, expected plain"),
        (one(b"c__builtin__\neval\n(" + text("1") + b"tR"), "asks for __builtin__.eval"),
        (one(b"ctorch\nload\n(" + text("x") + b"tR"), "asks for torch.load"),
        (one(b"ctorch._utils\n_rebuild_tensor_v2\n)\x81"), "NEWOBJ"),
        (pickle.dumps({"a": 1}, 4), "protocol 4"),
        (one(b"\x8c\x02os\x8c\x06system\x93)R"), "SHORT_BINUNICODE"),
        (one(b"ccollections\nOrderedDict\n(]" + text("x") + b"atR"), "calls OrderedDict in another way"),
        (one(b"ccollections\nOrderedDict\n}b"), "sets attributes"),
        (pickled(b"}", MANY, text("a"), b"s"), "a tuple for a key"),
        (pickled(b"}", tensor(), text("a"), b"s"), "a View for a key"),
        (pickled(b"}", text("a"), b"0s"), "POP"),
        (pickled(b"}h\x05"), "damaged"),
        (pickled(b"t"), "damaged"),
        (pickled(b"]t"), "no mark"),
        (pickled(b""), "damaged"),
        (pickled(b"}}"), "damaged"),
        (b"\x80\x02}", "damaged"),
        (pickled(b"]", text("a"), b"K\x01s"), "something else than a dict"),
        (pickled(b"}K\x01a"), "something else than a list"),
        (one(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06K\x01tQ"),
         "another way than torch"),
        (pickled(b"}r\xff\xff\xff\xff" + text("a") + b"K\x01s"), "a is int"),
        (pickled(b"}" + b"]q\x00" * 10 + b"K\x01s"), "key"),
    ],
)  # fmt: skip
def test_pickles_that_are_more_or_less_than_tensors(tmp_path, pickle_, says):
    with pytest.raises(CheckpointError, match=says):
        read_state(archive(tmp_path / "w", pickle_))


def test_archives_that_torch_does_not_write(tmp_path):
    for made in (
        archive(tmp_path / "deflated", one(tensor()), zipfile.ZIP_DEFLATED),
        archive(tmp_path / "long", one(text("x" * (1 << 24)))),
        archive(tmp_path / "big", one(tensor()), byteorder=b"big"),
    ):
        with pytest.raises(CheckpointError, match="not a whole torch file"):
            read_state(made)
    with zipfile.ZipFile(tmp_path / "two", "w") as file:
        for root in ("a", "b"):
            file.writestr(f"{root}/data.pkl", one(tensor()))
    with pytest.raises(CheckpointError, match="not a whole torch file"):
        read_state(tmp_path / "two")
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "twice", "w") as file:
        for _ in range(2):
            file.writestr("a/data.pkl", one(tensor()))
    with pytest.raises(CheckpointError, match="not a whole torch file"):
        read_state(tmp_path / "twice")


def saved(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


WHOLE = {zipped: saved(zipped) for zipped in (True, False)}


@settings(max_examples=300, deadline=None)
@given(zipped=st.booleans(), data=st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory, zipped, data):
    content = bytearray(WHOLE[zipped])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(content)
    try:
        found = read_state(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(tensor.bits.nbytes <= len(content) for tensor in found.values())
