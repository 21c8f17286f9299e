"""Baseline scores against their definitions, one entry at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_near

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import select
from mlx_kvret.core.policies import keydiff_score, knorm_score, random_score, recent_score


def hashed(position: int, head: int, seed: int) -> float:
    """The documented mix in unbounded integers."""
    mask = 2**32 - 1
    x = ((position * 0x9E3779B1) ^ (head * 0x85EBCA77) ^ seed) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return ((x ^ (x >> 16)) >> 8) / 2**24


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 5000), st.integers(0, 2**32 - 1))
def test_random_is_a_function_of_place_and_seed(position, head, seed):
    score = random_score(np.array([position, position], np.int32), np.array([head, 0]), seed)
    assert score.dtype == np.float32
    assert score.tolist() == [hashed(position, head, seed), hashed(position, 0, seed)]
    assert (score >= 0).all() and (score < 1).all()


def test_random_is_uniform_over_tokens_and_heads():
    position, head = np.meshgrid(np.arange(4096), np.arange(8))
    first, second = (random_score(position, head, seed) for seed in (0, 1))
    for score in (first, first[3], first[:, 100]):
        assert abs(score.mean() - 0.5) < 4 / math.sqrt(12 * score.size)
    counts = np.histogram(first, bins=64, range=(0, 1))[0]
    expected = first.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * math.sqrt(2 * 63)  # chi-square
    for a, b in ((first, second), (first[0], first[1]), (first[:, 1:], first[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_recent_with_sinks_is_streaming_llm():
    config = EvictionConfig.create(8, buffer=0, policy="recent", sinks=3, window=0)
    position, head = np.tile(np.arange(50), 2), np.repeat([0, 1], 50)
    mask = select(recent_score(position), position, head, 50, config, 1, 2)
    for h in (0, 1):
        assert position[mask & (head == h)].tolist() == [0, 1, 2, 45, 46, 47, 48, 49]


def test_recent_is_exact_to_its_limit():
    score = recent_score(np.array([2**24 - 2, 2**24 - 1], np.int32))
    assert score.dtype == np.float32 and score[0] < score[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_knorm_keeps_small_keys(dtype):
    keys = np.random.default_rng(0).normal(size=(7, 60)).astype(dtype)
    exact = [-math.hypot(*map(float, key)) for key in keys]
    assert knorm_score(keys).dtype == np.float32
    assert_near(knorm_score(keys), exact, 32, np.abs(exact))
    assert knorm_score(np.full((1, 60), 600, dtype)) == pytest.approx(-600 * math.sqrt(60))
    assert knorm_score(keys[:0]).shape == (0,)


def test_keydiff_keeps_unusual_keys():
    rng = np.random.default_rng(1)
    head = rng.integers(0, 4, 40)
    head[head == 2] = 3  # an empty head
    keys = rng.normal(size=(40, 6)).astype(np.float32)
    keys[5] = 0
    score = keydiff_score(keys, head, 5)
    assert score.dtype == np.float32
    for i, (key, h) in enumerate(zip(keys.astype(np.float64), head, strict=True)):
        directions = [k / np.linalg.norm(k) for k in keys[head == h].astype(np.float64) if k.any()]
        anchor = np.mean(directions, axis=0)
        cosine = key @ anchor / (np.linalg.norm(key) * np.linalg.norm(anchor)) if key.any() else 0
        # of unit vectors, however small it is
        assert_near(score[i], -cosine, 32, 1)


def test_keydiff_evicts_the_crowd_first():
    crowd = np.array([[1, 0.01 * i] for i in range(5)])
    keys = np.concatenate([crowd, [[-1.0, 0.5]]])
    score = keydiff_score(keys, np.zeros(6, int), 1)
    assert score.argmax() == 5
    assert keydiff_score(keys[:1], np.zeros(1, int), 1) == pytest.approx(-1)
