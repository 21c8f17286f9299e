"""Gates in the MLX form: exact in float types, bounded error in 8 bits, and what is refused."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from released import DTYPES, config, state, write

from mlx_kvret.converters import FORMS, convert, load_any, mlx_form
from mlx_kvret.core.checkpoint import load_gates, save_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.tensors import Tensor, read_tensors, write_tensors
from mlx_kvret.errors import CheckpointError, ConfigError

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@pytest.fixture
def shared(tmp_path):
    source = write(tmp_path / "released", config(), state())
    convert(source, tmp_path / "shared", "shared")
    return tmp_path / "shared"


def assert_same(found, expected):
    assert found.config == expected.config and found.provenance == expected.provenance
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape), name
        assert found.tensors[name].bits.tobytes() == tensor.bits.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_shared_to_mlx_and_back_is_bit_equal(tmp_path, kind, tied, dtype):
    gates = state(kind, tied, dtype)
    gates["model.layers.0.self_attn.retention_gate.linear1.bias"][:2] = -0.0
    convert(write(tmp_path / "released", config(kind, tied), gates), tmp_path / "shared", "shared")
    there = convert(tmp_path / "shared", tmp_path / "mlx", "mlx")
    convert(tmp_path / "mlx", tmp_path / "again", "shared")
    assert there.agreement is None and "lossless" in str(there)
    assert_same(load_gates(tmp_path / "again"), load_gates(tmp_path / "shared"))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("to", FORMS)
def test_dtype_change_rounds_to_nearest(tmp_path, shared, to, dtype):
    convert(shared, tmp_path / "out", to, dtype=dtype)
    found, source = load_any(tmp_path / "out"), load_gates(shared)
    for name, tensor in found.tensors.items():
        exact = mx.array(source.tensors[name].bits)
        rounded = exact.astype(getattr(mx, dtype)).astype(mx.float32)
        assert tensor.dtype == CODES[dtype]
        np.testing.assert_array_equal(tensor.float32(), rounded)


def test_widening_is_lossless(tmp_path):
    source = write(tmp_path / "released", config(), state(dtype=DTYPES[1]))
    done = convert(source, tmp_path / "wide", "shared", dtype="float32")
    assert done.agreement is None
    back = convert(tmp_path / "wide", tmp_path / "narrow", "shared", dtype="bfloat16")
    assert back.agreement is None
    assert_same(load_gates(tmp_path / "narrow"), load_any(source))


def test_value_beyond_float16_is_refused(tmp_path):
    gates = state()
    gates["model.layers.0.self_attn.retention_gate.linear1.bias"][3] = 1e5
    source = write(tmp_path / "released", config(), gates)
    with pytest.raises(ConfigError, match=r"layers.0.linear1.bias holds values beyond the range of float16"):
        convert(source, tmp_path / "out", "shared", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", CODES)
def test_eight_bits_stay_within_one_step(tmp_path, shared, dtype):
    done = convert(shared, tmp_path / "mlx", "mlx", dtype=dtype, bits=8)
    source, found = load_gates(shared), load_any(tmp_path / "mlx")
    unit = {"float32": 2e-7, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for name, tensor in source.tensors.items():
        exact, near = tensor.float32(), found.tensors[name].float32()
        assert found.tensors[name].dtype == CODES[dtype]
        if name.endswith(("linear1.weight", "linear2.weight")):
            groups = exact.reshape(-1, 32)
            # MLX stretches the steps by up to 0.5 in 127.5 so that 0 is one of them: 1 step over all 255
            step = np.ptp(groups, 1, keepdims=True) / 255
            slack = 4 * unit * np.abs(groups).max(1, keepdims=True)
            assert (np.abs(near.reshape(-1, 32) - groups) <= step + slack).all(), name
            assert (near != exact).any()
        else:
            np.testing.assert_allclose(near, exact, rtol=unit)
    size = os.path.getsize(tmp_path / "mlx" / "gates.safetensors")
    assert size < os.path.getsize(shared / "gates.safetensors") / 2
    assert done.agreement is not None


def test_eight_bits_load_as_they_were_saved_and_compute_alike(tmp_path, shared):
    convert(shared, tmp_path / "mlx", "mlx", bits=8)
    loaded, made = mlx_form.load_mlx_gates(tmp_path / "mlx"), mlx_form.to_mlx(load_gates(shared), 8)
    assert mlx_form.quantization(loaded) == {"bits": 8, "group_size": 32}
    x = mx.random.normal((5, 64), key=mx.random.key(0))
    dequantised = mlx_form.to_mlx(load_any(tmp_path / "mlx"))
    for layer in range(3):
        assert mx.array_equal(loaded.log_beta(layer, x), made.log_beta(layer, x))
        np.testing.assert_allclose(
            loaded.log_beta(layer, x), dequantised.log_beta(layer, x), rtol=1e-3, atol=1e-8
        )


def test_way_back_from_eight_bits_is_told(tmp_path, shared):
    convert(shared, tmp_path / "mlx", "mlx", bits=8)
    done = convert(tmp_path / "mlx", tmp_path / "back", "shared")
    assert load_gates(tmp_path / "back").provenance["dequantized_from"] == {"bits": 8, "group_size": 32}
    assert "have been through 8 bits" in str(done)


@pytest.mark.parametrize(
    ("hidden", "width", "expected"), [(256, 512, 128), (64, 512, 64), (2560, 96, 32), (96, 32, 32)]
)
def test_group_size_divides_all_rows(hidden, width, expected):
    assert mlx_form.group_size(GateConfig("rg10", 1, 1, hidden, width)) == expected


@pytest.mark.parametrize("hidden", [48, 65])
def test_rows_that_cannot_be_quantised(tmp_path, hidden):
    gates = GateConfig("rg", 1, 1, hidden, 32)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in gates.tensor_shapes().items()}
    save_gates(tmp_path / "shared", gates, weights)
    with pytest.raises(ConfigError, match="multiples of 32; store them as bfloat16"):
        convert(tmp_path / "shared", tmp_path / "mlx", "mlx", bits=8)
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("bits", [0, 4, 16, True])
def test_other_bits_are_refused(tmp_path, shared, bits):
    with pytest.raises(ConfigError, match="expected 8"):
        convert(shared, tmp_path / "mlx", "mlx", bits=bits)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("form", "shared", "'shared' form; expected the 'mlx' form"),
        ("dtype", "int8", "dtype 'int8'"),
        ("dtype", ["float32"], "has dtype"),
        ("dtype", "bfloat16", "has type F32; expected BF16"),
        ("quantization", {"bits": 4, "group_size": 32}, "expected null or 8 bits"),
        ("quantization", {"bits": 8, "group_size": 64}, "that divide hidden size and width"),
        ("quantization", "8", "expected null or 8 bits"),
        ("quantization", None, r"unexpected layers.0.linear1.biases"),
        ("version", 2, "has version 2; this release reads version 1"),
    ],
)
def test_manifest_that_does_not_fit(tmp_path, shared, field, value, says):
    convert(shared, tmp_path / "mlx", "mlx", bits=8)
    path = tmp_path / "mlx" / "kvret.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=says):
        mlx_form.load_mlx_gates(tmp_path / "mlx")


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("layers.1.linear1.scales", None, "missing layers.1.linear1.scales"),
        ("layers.1.linear9.bias", Tensor.of(np.zeros(3)), "unexpected layers.1.linear9.bias"),
        ("layers.1.linear1.scales", Tensor.of(np.full((32, 2), np.nan)), "NaN or infinity"),
        ("layers.1.linear1.scales", Tensor.of(np.zeros((32, 4))), r"shape \(32, 4\); expected \(32, 2\)"),
        ("layers.1.linear1.weight", Tensor.of(np.zeros((32, 16))), "type F32; expected U32"),
        ("shared.bias", Tensor("U32", np.zeros(2, "<u4")), "type U32; expected F32"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, shared, name, tensor, says):
    convert(shared, tmp_path / "mlx", "mlx", bits=8)
    path = tmp_path / "mlx" / "gates.safetensors"
    tensors = read_tensors(path) | {name: tensor}
    write_tensors(path, {n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=says):
        mlx_form.load_mlx_gates(tmp_path / "mlx")


def test_truncated_file(tmp_path, shared):
    convert(shared, tmp_path / "mlx", "mlx")
    path = tmp_path / "mlx" / "gates.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        convert(tmp_path / "mlx", tmp_path / "out", "shared")
    assert not (tmp_path / "out").exists()
