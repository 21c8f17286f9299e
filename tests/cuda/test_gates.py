"""Gates of all layers in one batched product, against those of one layer after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rounding import assert_near

from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.config import ACTIVATIONS, GateConfig
from mlx_kvret.core.installed import installed
from mlx_kvret.core.tensors import FLOATS, Tensor
from mlx_kvret.cuda_backend.gates import RetentionGates, from_checkpoint, to_arrays

from .tiny import attached, new_cache, run


def random_gates(dtype: torch.dtype = torch.float32, **options: Any) -> RetentionGates:
    torch.manual_seed(0)
    config = GateConfig(
        **{"kind": "rg10", "layers": 5, "kv_heads": 3, "hidden_size": 12, "width": 7} | options
    )
    gates = RetentionGates(config).requires_grad_(False)
    for weight in gates.parameters():
        weight.normal_()
    return gates.to(dtype)


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 4), (1, 4), (2,)])
def test_stacked_layers_equal_single_ones(kind: str, shared: bool, layers: tuple[int, ...]) -> None:
    for activation in ACTIVATIONS:
        gates = random_gates(kind=kind, shared_projection=shared, activation=activation)
        before = {name: weight.clone() for name, weight in gates.state_dict().items()}
        gates.stack(layers)
        assert gates.stacked == layers
        assert all(torch.equal(weight, before[name]) for name, weight in gates.state_dict().items())
        for shape in ((12,), (1, 1, 12), (2, 9, 12)):
            x = torch.randn(len(layers), *shape)
            expected = torch.stack([gates.log_beta(layer, own) for layer, own in zip(layers, x, strict=True)])
            assert_near(gates.log_betas(x), expected, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    gates, x = random_gates(dtype), torch.randn(5, 2, 9, 12)
    gates.stack(range(5))
    expected = torch.stack([gates.log_beta(layer, own) for layer, own in enumerate(x)])
    found = gates.log_betas(x)
    assert found.dtype == torch.float32
    # summed in another order an inner value may round to its neighbour, and be weighed by up to 4
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_the_weights_are_held_once() -> None:
    gates = random_gates()
    gates.stack(range(5))
    gates.layers[3].linear1.weight.zero_()
    gates.layers[3].linear1.bias.zero_()
    x = torch.randn(5, 4, 12)
    assert torch.equal(gates.log_betas(x)[3, 0], gates.log_betas(-x)[3, 1])


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("shared", [True, False])
def test_maps_of_different_types(kind: str, shared: bool) -> None:
    gates = random_gates(kind=kind, shared_projection=shared)
    weights = to_arrays(gates).items()
    stored = {name: Tensor.of(weight, FLOATS[i % 3]) for i, (name, weight) in enumerate(weights)}
    checkpoint = GateCheckpoint(gates.config, stored)
    found = from_checkpoint(checkpoint)
    gates.load_state_dict({name: torch.from_numpy(tensor.float32()) for name, tensor in stored.items()})
    found.stack(range(5))
    x = torch.randn(5, 4, 12)
    expected = torch.stack([gates.log_beta(layer, own) for layer, own in enumerate(x)])
    assert_near(found.log_betas(x), expected, 64)
    if installed("mlx"):
        import mlx.core as mx

        from mlx_kvret.mlx_backend import gates as mlx_gates

        own = mlx_gates.from_checkpoint(checkpoint)
        other = [np.array(own.log_beta(layer, mx.array(part.numpy()))) for layer, part in enumerate(x)]
        assert_near(np.stack(other), expected, 64)


def test_one_call_serves_all_layers_while_decoding() -> None:
    model, made = attached("llama")
    gates, calls = made.gates, []
    single, batched = type(gates).log_beta, type(gates).log_betas
    assert gates is not None
    gates.log_beta = lambda layer, x: calls.append(("one", x.shape[1])) or single(gates, layer, x)
    gates.log_betas = lambda x: calls.append(("all", x.shape[2])) or batched(gates, x)
    cache, ids = new_cache(model, budget=400, buffer=40), torch.randint(1, 96, (1, 60))
    assert cache.shared is not None
    defer = cache.shared.shape.deferred(400, 40)
    assert 2 < defer < 32
    run(model, ids[:, : defer + 1], cache)
    assert calls == [("one", defer + 1)] * 3
    calls.clear()
    for token in ids[:, defer + 1 : 2 * defer + 2].split(1, 1):
        run(model, token, cache)
    # the last one waits
    assert calls == [("all", defer)]
