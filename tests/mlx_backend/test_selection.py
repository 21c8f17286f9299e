"""Scores and selection on the device against the policy core: ties, infinities, NaN, free slots."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_near

from mlx_kvret.core import policies, retention
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import due_groups, heads_per_group
from mlx_kvret.core.eviction import select as oracle
from mlx_kvret.mlx_backend.selection import keydiff_score, retention_score, select

SCORES = [-np.inf, -1e38, -3.0, -1.0, -1e-30, -0.0, 0.0, 2.0, np.inf, np.nan]
LAYERS, KV_HEADS = 2, 2
HEADS = LAYERS * KV_HEADS


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scope=st.sampled_from(["global", "layer", "head"]),
    budget=st.integers(1, 9),
    sinks=st.integers(0, 2),
    min_per_head=st.integers(0, 3),
    threshold=st.sampled_from([None, 0.5, 1.0]),
)
def test_selection_is_the_oracle_s_whatever_ties(seed, scope, budget, sinks, min_per_head, threshold):
    rng, seen = np.random.default_rng(seed), 14
    config = EvictionConfig(
        budget,
        0,
        scope,
        min_per_head=min(min_per_head, budget),
        sinks=min(sinks, budget),
        threshold=threshold,
    )
    size = heads_per_group(config, LAYERS, KV_HEADS)
    groups = HEADS // size
    # every head holds any set of positions, in any order, between free places
    owner, position = np.meshgrid(np.arange(HEADS), np.arange(seen), indexing="ij")
    alive = rng.random(owner.shape) < 0.85
    owner = np.where(alive, owner, HEADS).reshape(groups, -1)
    shuffled = rng.permuted(np.tile(np.arange(size * seen), (groups, 1)), axis=1)
    owner = np.take_along_axis(owner, shuffled, 1)
    position = np.take_along_axis(position.reshape(groups, -1), shuffled, 1)
    score = rng.choice(np.array(SCORES, np.float32), owner.shape)

    arrays = mx.array(score), mx.array(position.astype(np.int32)), mx.array(owner.astype(np.int32))
    keep = np.array(select(*arrays, seen, config, size, HEADS))
    held = owner < HEADS
    assert not keep[~held].any()
    rule = config, LAYERS, KV_HEADS
    expected = oracle(score[held], position[held], owner[held], seen, *rule)
    due = due_groups(np.bincount(owner[held], minlength=HEADS), *rule)
    due_entries = due[owner[held] // size]
    np.testing.assert_array_equal(keep[held][due_entries], expected[due_entries])


@pytest.mark.parametrize("lookahead", [1, 2, 64, 4096])
def test_retention_scores(lookahead):
    rng = np.random.default_rng(0)
    log_beta = -np.exp(rng.uniform(-30, 6, 500)).astype(np.float32)
    log_beta[:4] = 0, -1e-38, -np.inf, -80
    position = rng.integers(0, 10_000, 500).astype(np.int32)
    found = retention_score(mx.array(log_beta), mx.array(position), 10_000, lookahead)
    expected = retention.retention_score(log_beta, position, 10_000, lookahead)
    # age·log β and the log of a sum, which may cancel
    age = (10_001 - position) * np.abs(log_beta).astype(np.float64)
    assert_near(found, expected, 16, np.where(np.isfinite(age), age, 0) + np.log(lookahead) + 1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_keydiff_ignores_free_slots(dtype):
    rng = np.random.default_rng(0)
    keys, head = mx.array(rng.normal(size=(1, 40, 8))).astype(dtype), rng.integers(0, 4, (1, 40))
    found = np.array(keydiff_score(keys, mx.array(head.astype(np.int32)), 3))[head < 3]
    real = np.array(keys.astype(mx.float32))[head < 3]
    # cosines: of unit vectors, however small they are
    assert_near(found, policies.keydiff_score(real, head[head < 3], 3), 64, 1)
