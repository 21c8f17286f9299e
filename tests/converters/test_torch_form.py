"""Gates in the torch form: stacked by layer and back without a changed bit, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from released import DTYPES, config, state, write
from safetensors.torch import load_file

from mlx_kvret import demo
from mlx_kvret.converters import casting, convert, load_any, torch_form
from mlx_kvret.core.checkpoint import load_gates, save_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.tensors import Tensor, read_tensors, write_tensors
from mlx_kvret.cuda_backend import api
from mlx_kvret.cuda_backend.gates import from_checkpoint
from mlx_kvret.errors import CheckpointError, ConfigError


@pytest.fixture
def shared(tmp_path):
    convert(write(tmp_path / "released", config(), state()), tmp_path / "shared", "shared")
    return tmp_path / "shared"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_shared_to_torch_and_back_is_bit_equal(tmp_path, kind, tied, dtype):
    gates = state(kind, tied, dtype)
    gates["model.layers.0.self_attn.retention_gate.linear1.bias"][:2] = -0.0
    convert(write(tmp_path / "released", config(kind, tied), gates), tmp_path / "shared", "shared")
    there = convert(tmp_path / "shared", tmp_path / "torch", "torch")
    assert there.agreement is None and "lossless" in str(there)
    convert(tmp_path / "torch", tmp_path / "again", "shared")
    for name in ("kvret.json", "gates.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()

    stacked = load_file(tmp_path / "torch" / "gates.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn.retention_gate."
        for name in (name.removeprefix(prefix) for name in gates if name.startswith(prefix)):
            once = tied and f"shared.{name}" in stacked
            found = stacked[f"shared.{name}"] if once else stacked[name][layer]
            assert torch.equal(found.view(torch.uint8), gates[prefix + name].view(torch.uint8)), name
    assert json.loads((tmp_path / "torch" / "kvret.json").read_text())["dtype"] == str(dtype)[6:]


def test_one_layer_is_stacked_as_well(tmp_path):
    gates = GateConfig("rg", 1, 2, 8, 4, shared_projection=False)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in gates.tensor_shapes().items()}
    save_gates(tmp_path / "shared", gates, weights)
    convert(tmp_path / "shared", tmp_path / "torch", "torch")
    assert {n: t.shape for n, t in read_tensors(tmp_path / "torch" / "gates.safetensors").items()} == {
        "linear1.weight": (1, 4, 8), "linear1.bias": (1, 4), "linear2.weight": (1, 2, 4), "bias": (1, 2)
    }  # fmt: skip
    found, expected = load_any(tmp_path / "torch"), load_gates(tmp_path / "shared")
    assert all(found.tensors[name].bits.tobytes() == t.bits.tobytes() for name, t in expected.tensors.items())


def test_types_that_differ_between_maps_stay_and_between_layers_are_refused(tmp_path, shared):
    source = load_gates(shared)
    shared_maps = {n: t.cast("BF16") for n, t in source.tensors.items() if n.startswith("shared.")}
    mixed = dataclasses.replace(source, tensors=source.tensors | shared_maps)
    torch_form.save_torch(tmp_path / "torch", mixed)
    found = load_any(tmp_path / "torch").tensors
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in mixed.tensors.items()}

    name = "layers.1.linear1.weight"
    uneven = source.tensors | {name: source.tensors[name].cast("F16")}
    save_gates(tmp_path / "uneven", source.config, uneven)
    with pytest.raises(ConfigError, match=r"store linear1.weight as F16 and F32, .* give one dtype"):
        convert(tmp_path / "uneven", tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "uneven", tmp_path / "out", "torch", dtype="float32")
    assert casting.common_dtype(load_any(tmp_path / "out").tensors) == "float32"


def test_the_torch_backend_runs_gates_of_this_form(tmp_path):
    convert(demo.GATES, tmp_path / "torch", "torch")
    ours, expected = api.read_gates(tmp_path / "torch"), api.read_gates(demo.GATES)
    x = torch.randn(5, expected.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in range(expected.config.layers):
        found = from_checkpoint(ours).log_beta(layer, x)
        assert torch.equal(found, from_checkpoint(expected).log_beta(layer, x))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("form", "mlx", "'mlx' form; expected the 'torch' form"),
        ("dtype", "int8", "dtype 'int8'"),
        ("dtype", ["float32"], "has dtype"),
        ("dtype", "bfloat16", "has type F32; expected BF16"),
        ("version", 2, "has version 2; this release reads version 1"),
    ],
)
def test_manifest_that_does_not_fit(tmp_path, shared, field, value, says):
    convert(shared, tmp_path / "torch", "torch")
    path = tmp_path / "torch" / "kvret.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=says):
        torch_form.load_torch(tmp_path / "torch")


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("linear2.bias", None, "missing linear2.bias"),
        ("layers.0.linear1.bias", Tensor.of(np.zeros(32)), "unexpected layers.0.linear1.bias"),
        ("linear1.bias", Tensor.of(np.full((3, 32), np.nan)), "NaN or infinity"),
        ("linear1.bias", Tensor.of(np.zeros((2, 32))), r"shape \(2, 32\); expected \(3, 32\)"),
        ("shared.bias", Tensor.of(np.zeros((1, 2))), r"shape \(1, 2\); expected \(2,\)"),
        ("linear1.bias", Tensor("U32", np.zeros((3, 32), "<u4")), "type U32; expected F32"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, shared, name, tensor, says):
    convert(shared, tmp_path / "torch", "torch")
    path = tmp_path / "torch" / "gates.safetensors"
    tensors = read_tensors(path) | {name: tensor}
    write_tensors(path, {n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=says):
        load_any(tmp_path / "torch")


def test_truncated_file(tmp_path, shared):
    convert(shared, tmp_path / "torch", "torch")
    path = tmp_path / "torch" / "gates.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_any(tmp_path / "torch")
