"""The torch gates: names of the shared checkpoint, and the same log β as the MLX gates."""

import numpy as np
import pytest
import torch
from rounding import assert_near

from mlx_kvret.core.checkpoint import load_gates, save_gates
from mlx_kvret.core.config import ACTIVATIONS, GateConfig
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.cuda_backend.gates import RetentionGates, from_checkpoint, to_arrays


def config(kind="rg10", shared=True, **more):
    return GateConfig(kind, 3, 2, 8, **{"width": 16, "bias_init": 6.0, "shared_projection": shared} | more)


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("shared", [True, False])
def test_names_and_shapes_are_the_checkpoint_s(kind, shared, tmp_path):
    gates = RetentionGates(config(kind, shared))
    shapes = {name: tuple(weight.shape) for name, weight in gates.state_dict().items()}
    assert shapes == gates.config.tensor_shapes()
    save_gates(tmp_path / "gates", gates.config, to_arrays(gates))
    again = from_checkpoint(load_gates(tmp_path / "gates"))
    x = torch.randn(4, 5, 8)
    for layer in range(3):
        assert torch.equal(again.log_beta(layer, x), gates.log_beta(layer, x))
    assert not any(weight.requires_grad for weight in again.parameters())


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind, shared", [("rg", False), ("rg10", True)])
def test_equal_mlx_gates(kind, shared, activation, stored, tmp_path):
    mx = pytest.importorskip("mlx.core")
    from mlx_kvret.mlx_backend.gates import from_checkpoint as mlx_from_checkpoint

    torch.manual_seed(0)
    gates = RetentionGates(config(kind, shared, activation=activation))
    tensors = {name: Tensor.of(array, stored) for name, array in to_arrays(gates).items()}
    save_gates(tmp_path / "gates", gates.config, tensors)
    checkpoint = load_gates(tmp_path / "gates")
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    mine, other = from_checkpoint(checkpoint), mlx_from_checkpoint(checkpoint)
    for layer in range(3):
        expected = np.array(other.log_beta(layer, mx.array(x)))
        found = mine.log_beta(layer, torch.from_numpy(x)).numpy()
        assert found.dtype == np.float32
        # log β is off, relative to itself, by the rounding of its logit, of about 20
        rounding = (3, np.abs(expected), "bfloat16") if stored == "BF16" else (32, 20 * np.abs(expected))
        assert_near(found, expected, *rounding)


def test_log_beta_of_half_precision_inputs_is_float32():
    gates = RetentionGates(config(bias_init=18.0))
    log_beta = gates.log_beta(0, torch.randn(3, 8, dtype=torch.bfloat16))
    assert log_beta.dtype == torch.float32
    assert ((log_beta < 0) & (log_beta > -1e-6)).all()
