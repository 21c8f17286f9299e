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
from mlx_kvret.mlx_backend import selection
from mlx_kvret.mlx_backend.kernels import compaction_plan, score_select
from mlx_kvret.mlx_backend.pool import Pool

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
    rest = wanted, 10_000, groups * size, lowest
    passes = ("run",) if count == 9000 else ("asan", "tsan", "run")
    check(
        lambda: score_select.select(*arrays, *rest),
        lambda: selection.select_reference(*arrays, *rest),
        passes=passes,
    )


def test_must_stay_counts_before_any_score_and_nothing_dead_stays():
    score = mx.array([[math.inf, -5.0, math.nan, 2.0, 9.0]])
    must = mx.array([[False, True, True, False, True]])
    position, head = mx.array([[4, 3, 2, 1, 0]]), mx.array([[0, 0, 1, 1, 2]])
    for wanted, kept in [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])]:
        want = mx.array([[i in kept for i in range(5)]])
        check(
            lambda n=wanted: score_select.select(score, must, position, head, n, 5, 2, 0.0), lambda w=want: w
        )


def test_zeros_of_both_signs_are_equal():
    rng = np.random.default_rng(0)
    _, must, position, head = candidates(1, 501, 6, seen=10_000, rng=rng)
    score = mx.array(np.copysign(np.float32(0), rng.normal(0, 1, must.shape)).astype(np.float32))
    rest = must, position, head, 100, 10_000, 6, -math.inf
    check(lambda: score_select.select(score, *rest), lambda: selection.select_reference(score, *rest))


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
        keep = score_select.select(score, must, position, head, budget * heads, 100, heads, -math.inf)
    alive = np.array(head[0]) < heads
    if alive.sum() < budget * heads:
        assert (np.array(keep[0]) == alive).all()
        return
    oracle = eviction.select(
        *(np.array(a[0])[alive] for a in (score, position, head)), 100, config, layers, kv_heads
    )
    assert (np.array(keep[0])[alive] == oracle).all() and not np.array(keep[0])[~alive].any()


@pytest.mark.parametrize("lookahead", [1, 7, 128])
def test_scores(lookahead):
    log_beta = mx.array(
        [[-1e-6, -1e-31, 0.0, -3.0, -math.inf, -50.0], [-1e-3, -0.7, -2e-8, -9.0, -1e-20, -88.0]]
    )
    position = mx.array([[0, 3, 99, 5, 7, 8], [1, 2, 3, 4, 5, 6]])
    check(
        lambda: score_select.retention_score(log_beta, position, 100, lookahead),
        lambda: selection.retention_score_reference(log_beta, position, 100, lookahead),
        0.0 if lookahead == 1 else 1e-6,
    )


@pytest.mark.parametrize("slots", [1, 6, 1000, 9000])
def test_head_counts(slots):
    owner = mx.random.randint(0, 6, (slots,)).astype(mx.int32)
    twin = mx.zeros((6,), mx.int32).at[owner].add(1)
    check(
        lambda: score_select.head_counts(owner, 5),
        lambda: twin,
        passes=("run",) if slots == 9000 else ("asan", "tsan", "run"),
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 0.97, 1.0])
@pytest.mark.parametrize(
    ("groups", "slots", "newcomers"), [(1, 1, 1), (3, 100, 7), (2, 2100, 2500), (1, 9001, 900)]
)
def test_hole_filling(groups, slots, newcomers, share):
    pool = Pool(groups, 1)
    pool.capacity = slots
    keep = mx.random.bernoulli(share, (groups, slots))
    survives = mx.random.bernoulli(0.5, (groups, newcomers))
    passes = ("run",) if slots > 2000 and share != 0.4 else ("asan", "tsan", "run")
    check(
        lambda: compaction_plan.destinations(keep, survives),
        lambda: pool.destinations_reference(keep, survives),
        passes=passes,
    )
