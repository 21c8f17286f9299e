"""More of mlx-lm's model files, those that a common tiny configuration builds."""

import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from rounding import assert_near
from tiny import forward, pieces, prompt, random_gates, shape_of, tiny

import mlx_kvret

NAMES = [
    "cohere", "gemma", "gptj", "hunyuan_v1_dense", "internlm2", "internlm3", "mimo", "mixtral",
    "olmo2", "phimoe", "seed_oss", "smollm3", "starcoder2", "telechat3",
]  # fmt: skip
OWN = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 4096, "rotary_dim": 4, "n_inner": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_stock_logits_without_and_a_bound_with_eviction(name):
    model, chunks = tiny(name, **OWN.get(name, {})), pieces(prompt(40), [16, 16, 1])
    stock = make_prompt_cache(model)
    expected = [forward(model, chunk, stock) for chunk in chunks]
    mlx_kvret.attach(model)
    mlx_kvret.attach(model, random_gates(shape_of(model)))
    large, small = mlx_kvret.make_cache(model, budget=40), mlx_kvret.make_cache(model, budget=8, buffer=2)
    for chunk, logits in zip(chunks, expected, strict=True):
        assert_near(forward(model, chunk, large), logits, 64)
        evicted = forward(model, chunk, small)
        assert small.entries <= 10 * shape_of(model).heads
    assert np.abs(evicted - logits).max() > 1e-3
