"""A budget split between text and pictures on torch, and the same entries on both backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_kvret
from mlx_kvret.core import eviction
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.pictures import Picture
from mlx_kvret.cuda_backend.selection import select_split

from .oracle_torch import calls, read
from .tiny_torch import tiny_model

LAYERS, HEADS = 2, 3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(8, 40), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans())
def test_the_split_is_that_of_core(seed: int, seen: int, share: float, threshold: bool) -> None:
    random = np.random.default_rng(seed)
    heads = LAYERS * HEADS
    pictures = (Picture(2, 5, advance=3), Picture(6, seen - 1, advance=1))
    config = EvictionConfig.create(
        budget=3, buffer=1, policy="learned", scope="modality", picture_share=share, sinks=1, window=2,
        threshold=0.5 if threshold else None,
    )  # fmt: skip
    held = random.random((heads, seen)) < 0.7
    # what is protected is there
    held[:, :1] = held[:, -2:] = True
    head, position = (a.astype(np.int32) for a in np.nonzero(held))
    # few values, so that there are ties
    score = random.integers(-3, 1, len(head)).astype(np.float32)
    expected = eviction.select(score, position, head, seen, config, LAYERS, HEADS, pictures)
    if len(head) < (config.budget + config.buffer) * heads:
        return
    order = random.permutation(len(head))
    rows = [torch.from_numpy(a[order])[None] for a in (score, position, head)]
    # one place that holds no entry
    rows = [
        torch.cat([a, torch.full((1, 1), heads if n == 2 else 0, dtype=a.dtype)], 1)
        for n, a in enumerate(rows)
    ]
    found = select_split(*rows, seen, config, heads, pictures)[0]
    assert not found[-1] and found[:-1].tolist() == expected[order].tolist()


@pytest.mark.parametrize(("share", "pictures"), [(0.0, "few"), (1.0, "many")])
def test_a_model_keeps_what_its_share_says(share: float, pictures: str) -> None:
    model = mlx_kvret.attach(tiny_model("qwen3_vl"), None)
    options: dict[str, Any] = {"budget": 6, "buffer": 1, "policy": "random", "sinks": 0, "window": 0}
    cache = mlx_kvret.make_cache(model, **options, scope="modality", picture_share=share)
    read(model, cache, calls("qwen3_vl"))
    kept = {
        name: sum(len(h) for own in cache.kept_positions(modality=name) for h in own)
        for name in ("text", "picture")
    }
    assert sum(kept.values()) == sum(len(h) for own in cache.kept_positions() for h in own)
    assert kept["picture"] == 0 if pictures == "few" else kept["picture"] > kept["text"]
