"""Scores, selection, per-head counts and hole filling against plain MLX and the numpy policy."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_host import check, installed

from mlx_kvret.core import eviction
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.mlx_backend.candidates import candidates_kernel, candidates_reference
from mlx_kvret.mlx_backend.kernels import compaction_plan, score_select
from mlx_kvret.mlx_backend.pool import destinations_reference
from mlx_kvret.mlx_backend.selection import select_reference

from .cases import pool_with, uniform

AWKWARD = [math.nan, -math.inf, math.inf, -0.0, 0.0, 1e-45, -1e-45, 3.4e38]


def candidates(groups, count, size, seen, rng, distinct=None):
    """Scores (few ``distinct`` ones, or any), must, position and head, each (groups, count)."""
    shape = groups, count
    score = rng.normal(0, 1, shape) if distinct is None else rng.integers(0, distinct, shape) - distinct / 2
    score = score.astype(np.float32)
    score[rng.random(shape) < 0.05] = rng.choice(np.array(AWKWARD, np.float32))
    heads = groups * size
    head = rng.integers(0, size, shape) + size * np.arange(groups)[:, None]
    head[rng.random(shape) < 0.2] = heads
    # a head holds a position once, so that the order is total
    position = np.stack([rng.permutation(seen)[:count] for _ in range(groups)])
    must = rng.random(shape) < 0.1
    return [mx.array(a) for a in (score, must, position.astype(np.int32), head.astype(np.int32))]


def both(arrays, wanted, seen, heads, lowest):
    """The kernels' selection of all groups at once, and the twin's of one group after the other.

    Numbers are one for all groups, or one for each.
    """
    score, must, position, head = arrays
    own = [np.broadcast_to(np.asarray(n), len(score)) for n in (wanted, seen, lowest)]

    def plain():
        told = zip(*(a.tolist() for a in own), strict=True)
        return mx.concatenate(
            [
                select_reference(*(a[g : g + 1] for a in arrays), most, clock, heads, least)
                for g, (most, clock, least) in enumerate(told)
            ]
        )

    return lambda: score_select.select(score, must, position, head, own[0], own[1], heads, own[2]), plain


@pytest.mark.parametrize(
    ("groups", "count", "size", "wanted", "distinct", "lowest"),
    [
        (1, 501, 6, 100, None, -math.inf),
        (1, 501, 6, 377, 3, -math.inf),
        (3, 77, 2, 20, 1, -math.inf),
        (2, 300, 4, 40, 2, -0.5),
        (2, 300, 4, 290, 8, 0.5),
        (5, 1, 1, 1, None, -math.inf),
        (1, 9, 3, 1000, None, -math.inf),
        (1, 9000, 3, 4000, 40, -math.inf),
    ],
    ids=[
        "any",
        "ties",
        "one value",
        "threshold",
        "threshold, nearly all",
        "one entry",
        "wants all",
        "blocks",
    ],
)
def test_selection(groups, count, size, wanted, distinct, lowest):
    rng = np.random.default_rng(count)
    arrays = candidates(groups, count, size, seen=10_000, rng=rng, distinct=distinct)
    passes = ("run",) if count == 9000 else ("asan", "tsan", "run")
    check(*both(arrays, wanted, 10_000, groups * size, lowest), passes=passes)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("distinct", [None, 3], ids=["any", "ties"])
def test_rows_of_other_budgets_and_ages_select_at_once(rows, distinct):
    groups, size = 2, 3
    rng = np.random.default_rng(rows)
    arrays = candidates(rows * groups, 90, size, seen=200, rng=rng, distinct=distinct)
    # heads count within a row, and one row has no entry at all
    head = np.where(np.array(arrays[3]) < rows * groups * size, np.array(arrays[3]) % (groups * size), 6)
    head[:groups] = 6 if rows > 1 else head[:groups]
    arrays[3] = mx.array(head.astype(np.int32))
    wanted, seen = (np.repeat(rng.integers(*span, rows), groups) for span in ((1, 60), (200, 70_000)))
    lowest = np.repeat(rng.choice([-math.inf, -0.5, 0.7], rows), groups)
    check(*both(arrays, wanted, seen, 6, lowest), passes=("tsan", "run") if rows == 5 else ("run",))


def test_must_stay_counts_before_any_score_and_nothing_dead_stays():
    score = mx.array([[math.inf, -5.0, math.nan, 2.0, 9.0]])
    must = mx.array([[False, True, True, False, True]])
    position, head = mx.array([[4, 3, 2, 1, 0]]), mx.array([[0, 0, 1, 1, 2]])
    for wanted, kept in [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])]:
        want = mx.array([[i in kept for i in range(5)]])
        kernels, _ = both((score, must, position, head), wanted, 5, 2, 0.0)
        check(kernels, lambda w=want: w)


def test_zeros_of_both_signs_are_equal():
    rng = np.random.default_rng(0)
    _, must, position, head = candidates(1, 501, 6, seen=10_000, rng=rng)
    score = mx.array(np.copysign(np.float32(0), rng.normal(0, 1, must.shape)).astype(np.float32))
    check(*both((score, must, position, head), 100, 10_000, 6, -math.inf))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_selection_is_that_of_the_policy(count, layers, kv_heads, budget, seed):
    rng = np.random.default_rng(seed)
    config = EvictionConfig(
        budget=budget, buffer=0, sinks=rng.integers(0, budget + 1).item(), scope="global", min_per_head=0
    )
    heads = layers * kv_heads
    score, _, position, head = candidates(1, count, heads, 100, rng, distinct=4)
    must = (position < config.sinks) | (position >= 100)
    with installed():
        keep = both((score, must, position, head), budget * heads, 100, heads, -math.inf)[0]()
    alive = np.array(head[0]) < heads
    if alive.sum() < budget * heads:
        assert (np.array(keep[0]) == alive).all()
        return
    oracle = eviction.select(
        *(np.array(a[0])[alive] for a in (score, position, head)), 100, config, layers, kv_heads
    )
    assert (np.array(keep[0])[alive] == oracle).all() and not np.array(keep[0])[~alive].any()


ROWS = [(0, 40, 44, 1, 0, 0), (3, 7, 10, 7, 2, 0), (1, 9000, 9500, 128, 0, 9), (2, 3, 3, 1, 1, 1)]


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
@pytest.mark.parametrize("learned", [True, False])
def test_candidates(rows, learned):
    pool = pool_with([[5, 0, 21, 2], [0] * 4, [1, 0, 0, 0], [30, 1, 1, 1]], 32, 32, free=2)
    # what stands in free slots is nobody's
    pool.retention = mx.where(pool.owner < pool.heads, -mx.abs(pool.retention), math.nan)
    newest = -mx.abs(uniform(4, 50))
    newest[:, :4] = mx.array([0.0, -1e-31, -math.inf, -88.0])
    rng = np.random.default_rng(rows)
    column, lengths = np.full((rows, 7), -1, np.int32), [7, 3, 1, 5]
    for row in range(rows):
        column[row, : lengths[row % 4]] = rng.permutation(50)[: lengths[row % 4]]
    numbers = np.array([ROWS[row % 4] for row in range(rows)], np.int32)
    arguments = pool, newest, column, numbers, learned
    ages = numbers[:, 2].max()

    def comparable(found):
        score, retention, position, head, must = found
        alive = head < pool.heads
        score = mx.where(alive, mx.clip(score, -1e9, 1e9) / (ages if learned else 1), 0.0)
        return [score, mx.where(alive, retention, 0.0), mx.where(alive, position, 0), head, must & alive]

    check(
        lambda: comparable(candidates_kernel(*arguments)),
        lambda: comparable(candidates_reference(*arguments)),
        1e-6,
        ("asan", "tsan", "run") if rows == 4 else ("run",),
    )


@pytest.mark.parametrize("slots", [1, 6, 1000, 9000])
def test_head_counts(slots):
    owner = mx.random.randint(0, 6, (2, slots)).astype(mx.int32)
    twin = mx.stack([mx.zeros((6,), mx.int32).at[row].add(1) for row in owner])
    check(
        lambda: score_select.head_counts(owner, 5),
        lambda: twin,
        passes=("run",) if slots == 9000 else ("asan", "tsan", "run"),
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 0.97, 1.0])
@pytest.mark.parametrize(
    ("groups", "slots", "newcomers"), [(1, 1, 1), (3, 100, 7), (2, 2100, 2500), (1, 9001, 900), (16, 20, 9)]
)
def test_hole_filling(groups, slots, newcomers, share):
    keep = mx.random.bernoulli(mx.array([share] * slots + [0.5] * newcomers), (groups, slots + newcomers))
    # of rows in any order
    base = np.random.default_rng(0).permutation(groups + 2)[:groups].astype(np.int32) * (slots + 1)
    passes = ("run",) if slots > 2000 and share != 0.4 else ("asan", "tsan", "run")
    check(
        lambda: compaction_plan.destinations(keep, base, slots),
        lambda: destinations_reference(keep, base, slots),
        passes=passes,
    )
