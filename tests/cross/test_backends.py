"""The two backends against each other: the same base weights, opened by mlx-lm and by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from cuda.tiny import checkpoint, tiny_model
from mlx_lm.utils import load_model
from rounding import assert_near

import mlx_kvret.mlx_backend.gates as mlx_gates
import mlx_kvret.mlx_backend.hooks as mlx_hooks
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend import gates, hooks

TOKENS = 2000
# in prefill and, at the end, in decoding
CHUNKS = [60] * 30 + [1] * 200
IDS = np.random.default_rng(4).integers(1, 96, TOKENS)


class Backends:
    """One model in both backends, attached with the same random gates."""

    def __init__(self, family: str, folder: Path, dtype: str = "float32") -> None:
        model = tiny_model(family).to(getattr(torch, dtype))
        model.save_pretrained(folder)
        self.torch: Any = model
        self.mlx, _ = load_model(folder)
        layers = sum(kind != "sliding_attention" for kind in getattr(model.config, "layer_types", [""] * 3))
        weights, owner = checkpoint(model, layers), {"model": family, "gates": "random"}
        self.made = (
            hooks.install(model, gates.from_checkpoint(weights), owner),
            mlx_hooks.install(self.mlx, mlx_gates.from_checkpoint(weights), owner),
        )

    def caches(self, config: EvictionConfig) -> tuple[Any, Any]:
        return hooks.new_cache(self.torch, self.made[0], config), mlx_hooks.new_cache(
            self.mlx, self.made[1], config
        )

    def steps(self, caches: tuple[Any, Any], chunks: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Forced tokens through both: logits (T, vocabulary) of torch and of MLX after each pass."""
        for part in np.split(IDS, np.cumsum(chunks))[: len(chunks)]:
            with torch.no_grad():
                ours = self.torch(torch.from_numpy(part)[None], cache=caches[0]).logits[0]
            theirs = self.mlx(mx.array(part)[None], cache=caches[1])[0]
            yield ours.float().numpy(), np.array(theirs.astype(mx.float32))


def kept(cache: Any) -> set[tuple[int, int, int]]:
    """(layer, head, position) of all entries."""
    layers = enumerate(cache.kept_positions())
    return {(layer, head, int(p)) for layer, heads in layers for head, kept in enumerate(heads) for p in kept}


@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3", "gemma3_text"])
def test_both_backends_keep_the_same_entries(family: str, tmp_path: Path) -> None:
    backends = Backends(family, tmp_path)
    caches = backends.caches(EvictionConfig.create(budget=32, buffer=8))
    before: set[tuple[int, int, int]] = set()
    compactions = 0
    for ours, theirs in backends.steps(caches, CHUNKS):
        # an angle of RoPE is rounded at the size of its position
        assert_near(ours, theirs, 2 * TOKENS)
        now = kept(caches[0])
        assert now == kept(caches[1])
        compactions += not before <= now
        before = now
    assert caches[0].seen == caches[1].seen == TOKENS
    assert compactions > 50


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_half_precision_agrees_but_for_rounding(family: str, tmp_path: Path) -> None:
    backends = Backends(family, tmp_path, "bfloat16")
    caches = backends.caches(EvictionConfig.create(budget=32, buffer=8))
    shared = []
    for _ in backends.steps(caches, CHUNKS[20:90]):
        a, b = kept(caches[0]), kept(caches[1])
        assert len(a) == len(b)
        shared.append(len(a & b) / len(a))
    print(f"{family}: {np.mean(shared):.1%} of the kept entries shared, at least {min(shared):.1%}")
    assert np.mean(shared) > 0.9
