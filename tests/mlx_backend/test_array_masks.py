"""Models that ask for their mask as an array, or mask in their own way."""

import mlx_lm.models.qwen3 as qwen3
import pytest
from mlx_lm.models.base import create_attention_mask
from rounding import assert_near
from tiny import forward, gated, pieces, prompt

import mlx_kvret
from mlx_kvret.errors import UnsupportedModelError


def test_the_mask_as_an_array_means_the_same(monkeypatch):
    model = gated()
    chunks = pieces(prompt(50), [16, 1, 9])
    cache = mlx_kvret.make_cache(model, budget=8, buffer=4)
    expected = [forward(model, chunk, cache) for chunk in chunks]
    monkeypatch.setattr(
        qwen3, "create_attention_mask", lambda h, cache: create_attention_mask(h, cache, return_array=True)
    )
    cache = mlx_kvret.make_cache(model, budget=8, buffer=4)
    for chunk, logits in zip(chunks, expected, strict=True):
        assert_near(forward(model, chunk, cache), logits, 64)


def test_a_mask_of_the_model_s_own_is_refused(monkeypatch):
    model = gated()
    monkeypatch.setattr(
        qwen3,
        "create_attention_mask",
        lambda h, cache: create_attention_mask(h, cache, return_array=True) & True,
    )
    with pytest.raises(UnsupportedModelError, match="changes its mask"):
        forward(model, prompt(9), mlx_kvret.make_cache(model))
