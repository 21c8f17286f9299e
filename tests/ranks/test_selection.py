"""A selection over ranks is that of one process, whatever ties and shares there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import protected
from mlx_kvret.core.eviction import select as alone
from mlx_kvret.core.ranks import Ranks, digits, select
from mlx_kvret.core.shares import Share
from mlx_kvret.errors import ConfigError, RankError

from .threads import together


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(2, 4),
    scope=st.sampled_from(["global", "layer"]),
    ties=st.sampled_from(["many", "some", "none", "equal", "special"]),
    sinks=st.integers(0, 2),
    window=st.integers(0, 3),
)
def test_over_ranks_as_alone(seed, size, scope, ties, sinks, window):
    """Uneven shares of the heads, empty ranks too, of candidates with equal scores, NaN and infinities."""
    rng = np.random.default_rng(seed)
    layers, heads, budget = int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(5, 12))
    config = EvictionConfig.create(budget=budget, buffer=2, scope=scope, sinks=sinks, window=window)
    seen, count = 60, int(rng.integers(budget - 2, budget + 8))
    flat = np.repeat(np.arange(layers * heads), count)
    position = np.concatenate([rng.choice(seen, count, replace=False) for _ in range(layers * heads)])
    score = -rng.exponential(size=len(flat)).astype(np.float32)
    if ties != "none":
        score = np.round(score, {"many": 0, "some": 2, "equal": 9, "special": 1}[ties])
    if ties == "equal":
        score[:] = -0.0
        score[::2] = 0.0
    if ties == "special":
        score[rng.integers(0, len(score), 9)] = rng.choice([np.nan, -np.inf, np.inf], 9)
    expected = alone(score, position, flat, seen, config, layers, heads)

    owner = rng.integers(0, size, layers * heads)
    per = layers * heads if scope == "global" else heads
    groups = layers * heads // per
    due = np.bincount(flat // per, minlength=groups) >= (config.budget + config.buffer) * per

    def work(ranks: Ranks):
        mine = owner[flat] == ranks.rank
        # in rows by group, the shorter ones filled up with what is no entry
        rows = [np.flatnonzero(mine & (flat // per == group)) for group in range(groups)]
        table = np.full((groups, max(map(len, rows)) + 1), -1)
        for row, own in zip(table, rows, strict=True):
            row[: len(own)] = own
        none = table < 0
        head = np.where(none, layers * heads, flat[table])
        must = protected(position, seen, config)[table]
        keep = select(
            score[table], must, position[table], head, budget * per, seen, layers * heads, ranks, due
        )
        assert not keep[none].any()
        return table[keep], ranks.rounds

    found = together(size, work)
    kept = np.zeros(len(flat), bool)
    for indices, _ in found:
        assert not kept[indices].any()
        kept[indices] = True
    assert (kept == expected).all()
    assert len({rounds for _, rounds in found}) == 1
    assert found[0][1] <= len(digits(seen, layers * heads))
    if not due.any():
        assert found[0][1] == 0


def test_two_rounds_without_ties_and_what_they_cost():
    rng = np.random.default_rng(0)
    count, heads = 4000, 8
    score = -rng.exponential(size=(2, 1, count)).astype(np.float32)
    position = np.tile(np.arange(count), (2, 1, 1))
    head = rng.integers(0, 4, (2, 1, count)) + np.array([0, 4])[:, None, None]

    def work(ranks: Ranks):
        args = score[ranks.rank], np.zeros((1, count), bool), position[ranks.rank], head[ranks.rank]
        select(*args, 5000, count, heads, ranks)
        return ranks.rounds, ranks.nbytes

    assert set(together(2, work)) <= {(2, 16384 + 8192), (3, 16384 + 2 * 8192)}


SHAPE = CacheShape(3, 2, 8, 8, 4, 32)


def test_shares_of_a_tensor_split():
    def work(ranks: Ranks):
        share = Share.tensor(ranks, SHAPE, latent=False)
        totals = share.totals(np.arange(6) + 10 * ranks.rank, EvictionConfig.create(8, scope="head"))
        return share.heads.tolist(), share.whole.kv_heads, totals.tolist()

    first, second = together(2, work)
    assert first[:2] == ([0, 1, 4, 5, 8, 9], 4)
    assert second[:2] == ([2, 3, 6, 7, 10, 11], 4)
    assert first[2] == second[2] == [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15]


def test_shares_of_a_layer_split():
    """The first rank has the last layers, as mlx-lm splits them."""
    layers = [[5, 7], [0, 2, 3]]

    def work(ranks: Ranks):
        own = layers[ranks.rank]
        share, places = Share.pipeline(ranks, CacheShape(len(own), 2, 8, 8, 4, 32), own)
        groups = share.groups(EvictionConfig.create(8, scope="layer")).tolist()
        spread = [
            share.spread(EvictionConfig.create(8, scope=scope)) for scope in ("global", "layer", "head")
        ]
        return share.heads.tolist(), share.whole.layers, places, groups, spread

    first, second = together(2, work)
    assert first[:4] == ([6, 7, 8, 9], 5, [0, 2, 3, 5, 7], [3, 4])
    assert second[:4] == ([0, 1, 2, 3, 4, 5], 5, [0, 2, 3, 5, 7], [0, 1, 2])
    assert first[4] == [True, False, False]


def test_gather_takes_arrays_of_any_length():
    def work(ranks: Ranks):
        return ranks.gather(np.full((ranks.rank, 3), ranks.rank, np.uint16))

    for parts in together(3, work):
        assert [part.tolist() for part in parts] == [[], [[1, 1, 1]], [[2, 2, 2], [2, 2, 2]]]


def test_the_first_rank_decides():
    masks = np.random.default_rng(0).random((2, 3, 47)) < 0.5
    for found in together(2, lambda ranks: ranks.first_mask(masks[ranks.rank])):
        assert (found == masks[0]).all()


def test_what_one_rank_refuses_all_refuse():
    def work(ranks: Ranks):
        def action():
            if ranks.rank == 1:
                raise ConfigError("too large for this machine")

        with pytest.raises((ConfigError, RankError)) as caught:
            ranks.agreed(action)
        return str(caught.value)

    messages = together(3, work)
    assert messages[1] == "too large for this machine"
    assert "rank 1" in messages[0] and "rank 1" in messages[2]
