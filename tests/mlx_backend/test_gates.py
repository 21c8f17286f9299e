"""Gates of all layers in one batched product say what each layer's own do, bit for bit on a CPU."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import gated

import mlx_kvret
from mlx_kvret.core.config import GateConfig
from mlx_kvret.mlx_backend.gates import RetentionGates


def gates_of(kind="rg10", shared=False, dtype=mx.float32, layers=5):
    shape = {"layers": layers, "kv_heads": 3, "hidden_size": 24, "width": 16}
    made = RetentionGates(GateConfig(kind, **shape, shared_projection=shared))
    made.set_dtype(dtype)
    mx.eval(made.parameters())
    return made


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(("kind", "shared"), [("rg10", False), ("rg", False), ("rg10", True)])
@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_all_layers_at_once(kind, shared, dtype, tokens):
    gates, layers = gates_of(kind, shared, dtype), (4, 0, 3)
    x = mx.random.normal((len(layers), tokens, 24)).astype(dtype)
    expected = mx.stack([gates.log_beta(layer, x[place]) for place, layer in enumerate(layers)])
    gates.stack(layers)
    assert gates.stacked == layers
    found = gates.log_betas(x)
    assert found.dtype == mx.float32 and found.shape == (3, tokens, 3)
    assert np.array_equal(np.array(found), np.array(expected))
    # what a layer's own gate says has not changed either
    again = mx.stack([gates.log_beta(layer, x[place]) for place, layer in enumerate(layers)])
    assert np.array_equal(np.array(again), np.array(expected))


def test_stacking_takes_no_memory():
    gates = gates_of(layers=8)
    mx.eval(gates.parameters())
    before = mx.get_active_memory()
    gates.stack(range(8))
    weights = sum(array.nbytes for array in gates._stacks.values())
    assert mx.get_active_memory() - before < 0.1 * weights


def test_other_weights_are_heeded():
    gates, x = gates_of(), mx.random.normal((5, 4, 24))
    gates.stack(range(5))
    gates.layers[2].bias = gates.layers[2].bias + 1
    assert gates.stacked == ()
    gates.stack(range(5))
    assert gates.stacked == (0, 1, 2, 3, 4)
    assert mx.array_equal(gates.log_betas(x)[2], gates.log_beta(2, x[2]))


@pytest.mark.parametrize("change", [nn.quantize, lambda gates: gates.set_dtype(mx.float16)])
@pytest.mark.parametrize("again", [False, True], ids=["asked", "stacked again"])
def test_old_weights_are_let_go(change, again):
    gates = RetentionGates(GateConfig("rg10", 4, 64, 64, 64))
    gates.stack(range(4))
    change(gates)
    if again:
        gates.stack(range(4))
    else:
        assert gates.stacked == ()
    assert [a for a in (*gates._stacks.values(), *gates._stacked[1]) if a.dtype == mx.float32] == []


def test_quantised_gates_are_asked_one_by_one():
    gates = RetentionGates(GateConfig("rg10", 2, 3, 64, 64))
    gates.stack(range(2))
    nn.quantize(gates, group_size=32, bits=8)
    assert gates.stacked == ()
    gates.stack(range(2))
    assert gates.stacked == () and gates.log_beta(1, mx.zeros((4, 64))).shape == (4, 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_keeps_the_same_either_way(rows, monkeypatch):
    model, kept, asked = gated(), [], []
    batched = RetentionGates.log_betas

    def log_betas(self, x):
        asked.append(x.shape[1])
        return batched(self, x)

    monkeypatch.setattr(RetentionGates, "log_betas", log_betas)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 60, 60 + row).tolist() for row in range(rows)]
    for once in (True, False):
        if not once:
            monkeypatch.setattr(RetentionGates, "stacked", property(lambda self: ()))
        asked.clear()
        found = mlx_kvret.stream_batch(model, None, prompts, budget=64, buffer=8, max_tokens=30)
        kept.append([str(one.cache.kept_positions()) for one in found if one.cache is not None])
        # several tokens wait for their gates, of which then all layers' are asked at once
        assert (max(asked, default=0) > 1) == once
    assert len(kept[0]) == rows and kept[0] == kept[1]
