"""Memory of a training step on MLX: what was measured, and what the estimate says."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen3

from mlx_kvret.core.config import GateConfig
from mlx_kvret.mlx_backend.gates import RetentionGates
from mlx_kvret.mlx_backend.training.memory import memory_of
from mlx_kvret.mlx_backend.training.step import gradient
from mlx_kvret.mlx_backend.training.student import Student
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.packing import Batch

TOKENS = 1024
MODEL = {
    "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6, "vocab_size": 2000,
    "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip


def step(layers, recompute):
    """(most bytes at once in a step beyond the weights, the estimate, bytes of the gates)."""
    config = MODEL | {"num_hidden_layers": layers}
    model = qwen3.Model(qwen3.ModelArgs(**config))
    shape = GateConfig("rg10", layers, 2, 256, width=512)
    gates = RetentionGates(shape)
    mx.eval(model.parameters(), gates.parameters())
    student = Student(model, recompute)
    ids, place = np.random.default_rng(0).integers(1, 2000, (1, TOKENS)), np.arange(TOKENS)[None]
    batch = Batch(ids, np.zeros_like(ids), place, np.ones_like(ids, dtype=bool))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gradient(student, gates, batch, TrainConfig(budget=32), 1)
    weights = sum(4 * np.prod(s) for s in shape.tensor_shapes().values())
    return mx.get_peak_memory() - before, memory_of(config, shape, 4, recompute).needed(TOKENS), weights


def test_recomputed_layers_keep_their_inputs_and_gradients_only():
    few, *_, small = step(16, recompute=True)
    many, *_, large = step(32, recompute=True)
    inputs = 16 * 4 * 256 * TOKENS
    # gradients lie beside their sums over micro-batches; with mx.checkpoint it is three times as much
    assert many - few <= inputs + 2 * (large - small)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("layers", [6, 12])
def test_the_estimate_is_enough_and_no_waste(layers, recompute):
    peak, estimate, _ = step(layers, recompute)
    assert peak <= estimate <= 3 * peak


def test_a_4b_model_in_16_gb():
    """Qwen3-4B at 4 bits, where macOS lets a GPU have 11 of 16 GB: what the README says."""
    config = MODEL | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "num_hidden_layers": 36,
    }  # fmt: skip
    memory = memory_of(config, GateConfig("rg10", 36, 8, 2560), 2, recompute=True)
    weights = 4.02e9 * 4.5 / 8
    assert 11_000 < memory.fitting(int(11e9 - weights)) < 12_000
