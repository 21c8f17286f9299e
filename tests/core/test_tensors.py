"""safetensors with bfloat16: values, bits, and files that are not whole."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mlx_kvret.core.tensors import FLOATS, Tensor, read_tensors, tensors_id, write_tensors
from mlx_kvret.errors import CheckpointError

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
any_floats = arrays(np.float32, array_shapes(min_dims=0, min_side=0), elements=st.floats(width=32))


@pytest.mark.parametrize("dtype", FLOATS)
@given(values=any_floats)
def test_rounding_is_that_of_torch(dtype, values):
    with np.errstate(over="ignore"):
        tensor = Tensor.of(values, dtype)
    expected = torch.tensor(values).to(TORCH[dtype])
    assert tensor.dtype == dtype and tensor.shape == values.shape
    np.testing.assert_array_equal(tensor.float32(), expected.float().numpy())


@given(bits=arrays(np.uint16, 20))
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widening_is_exact(dtype, bits):
    narrow = Tensor(dtype, bits if dtype == "BF16" else bits.view(np.float16))
    expected = torch.from_numpy(bits.view(np.int16)).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(narrow.float32(), expected)
    number = ~np.isnan(expected)
    again = narrow.cast("F32").cast(dtype).bits.view(np.uint16)
    np.testing.assert_array_equal(again[number], bits[number])


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000])
def test_nan_stays_nan(payload):
    values = np.array([payload], np.uint32).view(np.float32)
    assert np.isnan(Tensor.of(values, "BF16").float32()).all()


def test_same_type_is_the_same_tensor():
    tensor = Tensor.of(np.ones(3), "BF16")
    assert tensor.cast("BF16") is tensor


def tensors():
    rng = np.random.default_rng(0)
    return {
        "half.odd": Tensor.of(rng.normal(size=(3, 1)), "F16"),
        "brain.odd": Tensor.of(rng.normal(size=5), "BF16"),
        "bytes": Tensor("U8", np.arange(3, dtype="u1")),
        "single": Tensor.of(rng.normal(size=(2, 3)).T),
        "empty": Tensor.of(np.zeros((0, 4))),
        "scalar": Tensor.of(np.float32(3)),
        "packed": Tensor("U32", np.arange(4, dtype="<u4").reshape(2, 2)),
    }


def test_file_round_trip(tmp_path):
    write_tensors(tmp_path / "a.safetensors", tensors())
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].bits.tobytes() == tensor.bits.tobytes()


def test_the_library_reads_our_files_and_we_read_its(tmp_path):
    ours = {name: tensor for name, tensor in tensors().items() if tensor.dtype in TORCH}
    write_tensors(tmp_path / "ours", ours)
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    for name, tensor in ours.items():
        assert theirs[name].dtype == TORCH[tensor.dtype] and theirs[name].shape == tensor.shape
        np.testing.assert_array_equal(theirs[name].float().numpy(), tensor.float32())
    safetensors.torch.save_file(theirs, tmp_path / "theirs")
    assert tensors_id(read_tensors(tmp_path / "theirs")) == tensors_id(ours)


def test_data_is_aligned(tmp_path):
    """A file can be mapped into memory and its tensors used in place."""
    write_tensors(tmp_path / "a", tensors())
    content = (tmp_path / "a").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__").keys() == {"checksum"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors()[name].bits.itemsize == 0


@pytest.mark.parametrize("change", ["bits", "dtype", "shape", "name"])
def test_id_tells_tensors_apart(change):
    ours = {"a": Tensor.of(np.arange(6), "F16"), "b": Tensor.of(np.arange(3))}
    other = {
        "bits": {"a": Tensor.of(np.arange(6)[::-1], "F16"), "b": ours["b"]},
        "dtype": {"a": Tensor("BF16", ours["a"].bits.view("<u2")), "b": ours["b"]},
        "shape": {"a": Tensor.of(np.arange(6).reshape(2, 3), "F16"), "b": ours["b"]},
        "name": {"c": ours["a"], "b": ours["b"]},
    }[change]
    assert tensors_id(ours) != tensors_id(other)
    assert tensors_id(ours) == tensors_id(dict(reversed(ours.items())))


@pytest.mark.parametrize("keep", [0, 7, 8, 60, -1])
def test_truncated_file(tmp_path, keep):
    write_tensors(tmp_path / "a", tensors())
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a is not a whole safetensors file .* copy or make it again"):
        read_tensors(tmp_path / "a")


def test_what_is_no_safetensors_file(tmp_path):
    (tmp_path / "a").write_bytes(b"<html>" * 100)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "a")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"cannot read .* Is a directory"):
        read_tensors(tmp_path)
    safetensors.torch.save_file({"x": torch.zeros(2, dtype=torch.float64)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"tensor x .* has type F64; expected one of F32"):
        read_tensors(tmp_path / "c")
