"""Invariants of the cache under random use, without a model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend.bounded import Bounded

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
    """Few different values, so that ties are common; a zero input never decays."""

    stacked = (0, 1)

    def log_beta(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return -x[..., :2].abs().round()

    def log_betas(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_beta(0, x)


def feed(
    cache: Bounded,
    tokens: int,
    rng: np.random.Generator,
    names: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """A forward pass whose keys and values spell (row, layer, head, position)."""
    rows, start = len(cache.rows), torch.tensor([row.seen for row in cache.rows])
    cache.begin(rows, tokens, mask)
    assert cache.reading is not None
    begin = torch.tensor([tokens - count for count in cache.reading.counts])
    for layer in range(2):
        cache.reading.observe(layer, torch.from_numpy(rng.normal(size=(rows, tokens, 4)).astype(np.float32)))
        spelled = torch.zeros(rows, 2, tokens, 5)
        spelled[..., 0] = names[:, None, None] * 100 + layer * 10 + torch.arange(2)[:, None]
        spelled[..., 1] = torch.arange(tokens) + (start - begin)[:, None, None]
        cache.reading.append(layer, spelled[..., :3], spelled)
    cache.commit()


def check(cache: Bounded, names: torch.Tensor) -> None:
    config, size = cache.config, cache.arena.size
    entries, kept = cache.entries, [cache.kept_positions(row) for row in range(len(cache.rows))]
    assert entries == sum(len(p) for row in kept for layer in row for p in layer)
    for row, layers in enumerate(kept):
        seen, flat = cache.rows[row].seen, [p for layer in layers for p in layer]
        held = np.add.reduceat([len(p) for p in flat], np.arange(0, len(flat), size))
        assert (held < (config.budget + max(1, config.buffer)) * size).all()
        for positions in flat:
            assert (np.diff(positions) > 0).all() and set(positions) <= set(range(max(seen, 0)))
            assert set(range(min(config.sinks, seen))) <= set(positions)
            assert set(range(max(0, seen - config.window), seen)) <= set(positions)
            assert len(positions) >= min(seen, config.min_per_head)
    for name, pool in zip(names, (row.slab for row in cache.rows), strict=True):
        used = pool.owner < pool.heads
        owner, place = pool.owner[used].long(), pool.position[used]
        layer, head = owner // 2, owner % 2
        for stored in (pool.keys, pool.values) if pool.capacity else ():
            assert torch.equal(stored[used][:, 0].long(), name * 100 + layer * 10 + head)
            assert torch.equal(stored[used][:, 1].long(), place.long())
        listed = pool.table[: int(pool.offsets[-1])].long()
        assert torch.equal(listed.sort().values, used.nonzero()[:, 0])
        assert (pool.owner[listed].diff() >= 0).all()


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 3), st.lists(st.integers(1, 11), min_size=1, max_size=14), st.data())
def test_entries_stay_within_the_budget_and_unharmed(
    config: EvictionConfig, rows: int, steps: list[int], data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    cache = Bounded.single(SHAPE, config, {}, torch.device("cpu"), Gates())  # type: ignore[arg-type]
    padding = data.draw(st.lists(st.integers(0, steps[0] - 1), min_size=rows, max_size=rows))
    mask: torch.Tensor | None = torch.arange(steps[0]) >= torch.tensor(padding)[:, None]
    names = torch.arange(rows)
    cache.begin(rows, steps[0], mask)
    for tokens in steps:
        feed(cache, tokens, rng, names, mask)
        mask = None
        if data.draw(st.booleans()):
            twin = data.draw(st.sampled_from([copy.deepcopy, Bounded.copy]))(cache)
            feed(twin, 3, np.random.default_rng(0), names)
            check(twin, names)
        check(cache, names)
