"""Invariants of the cache under random use, without a model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_backend.bounded import Bounded
from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig

SHAPE = CacheShape(layers=2, kv_heads=2, key_dim=3, value_dim=5, itemsize=4, hidden_size=4)


def configs() -> st.SearchStrategy[EvictionConfig]:
    def build(budget: int, buffer: int, scope: Any, protect: int, threshold: float | None) -> EvictionConfig:
        part = min(protect, budget // 2)
        return EvictionConfig(
            budget, buffer, scope, min_per_head=part, sinks=part, window=part, threshold=threshold
        )

    scopes = st.sampled_from(["global", "layer", "head"])
    alpha = st.sampled_from([None, None, 0.5, 1.0])
    return st.builds(build, st.integers(1, 9), st.integers(0, 6), scopes, st.integers(0, 2), alpha)


class Gates:
    """Few different values, so that ties are common; a zero input never fades."""

    stacked = (0, 1)

    def log_beta(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return -x[..., :2].abs().round()

    def log_betas(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_beta(0, x)


def feed(cache: Bounded, tokens: int, rng: np.random.Generator) -> None:
    """A forward pass whose keys and values spell (row, layer, head, position)."""
    rows, start = cache.rows, cache.seen[0]
    cache.begin(rows, None)
    for layer, recent in enumerate(cache.recents):
        recent.observe(torch.from_numpy(rng.normal(size=(rows, tokens, 4)).astype(np.float32)))
        spelled = torch.zeros(rows, 2, tokens, 5)
        spelled[..., 0] = torch.arange(rows)[:, None, None] * 100 + layer * 10 + torch.arange(2)[:, None]
        spelled[..., 1] = torch.arange(start, start + tokens) - cache.padding[:, None, None]
        recent.append(spelled[..., :3], spelled)
        cache.seen[layer] += tokens


def check(cache: Bounded) -> None:
    config, pool = cache.config, cache.pool
    entries, kept = cache.entries, [cache.kept_positions(row) for row in range(cache.rows)]
    assert entries == sum(len(p) for row in kept for layer in row for p in layer)
    for row, layers in enumerate(kept):
        seen = cache.seen[0] - int(cache.schedule.padding[row])
        size, flat = cache.size, [p for layer in layers for p in layer]
        held = np.add.reduceat([len(p) for p in flat], np.arange(0, len(flat), size))
        assert (held < (config.budget + max(1, config.buffer)) * size).all()
        for positions in flat:
            assert (np.diff(positions) > 0).all() and set(positions) <= set(range(max(seen, 0)))
            assert set(range(min(config.sinks, seen))) <= set(positions)
            assert set(range(max(0, seen - config.window), seen)) <= set(positions)
            assert len(positions) >= min(seen, config.min_per_head)
    used = pool.owner < pool.heads
    owner, place = pool.owner[used].long(), pool.position[used]
    row, layer, head = owner // 4, owner // 2 % 2, owner % 2
    for stored in (pool.keys, pool.values) if pool.capacity else ():
        assert torch.equal(stored[used][:, 0].long(), row * 100 + layer * 10 + head)
        assert torch.equal(stored[used][:, 1].long(), place.long())
    listed = pool.lookup.table[: int(pool.lookup.offsets[-1])].long()
    assert torch.equal(listed.sort().values, used.nonzero()[:, 0])
    assert (pool.owner[listed].diff() >= 0).all()


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 3), st.lists(st.integers(1, 11), min_size=1, max_size=14), st.data())
def test_entries_stay_within_the_budget_and_unharmed(
    config: EvictionConfig, rows: int, steps: list[int], data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    cache: Any = Bounded(SHAPE, config, {}, torch.device("cpu"), Gates())  # type: ignore[arg-type]
    padding = data.draw(st.lists(st.integers(0, steps[0] - 1), min_size=rows, max_size=rows))
    mask = torch.arange(steps[0]) >= torch.tensor(padding)[:, None]
    cache.begin(rows, mask)
    for tokens in steps:
        feed(cache, tokens, rng)
        if data.draw(st.booleans()):
            twin = copy.deepcopy(cache)
            feed(twin, 3, np.random.default_rng(0))
            check(twin)
        check(cache)
