"""Scores against sums and logarithms computed term by term in double or 50-digit arithmetic."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.retention import log_geometric_sum, log_sigmoid, retention_score

ULP = float(np.finfo(np.float32).eps)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
LOG_BETAS = [0.0, -1e-38, -1e-30, -1e-20, -1e-12, -1e-8, -1e-6, -1e-4, -1e-2, -0.1, -0.5, -1, -3, -10, -50]


def near(found, exact, absolute=0.0):
    """Within a few roundings of float32."""
    return abs(float(found) - exact) <= 4 * ULP * abs(exact) + absolute


def summed(log_beta: np.float32, terms: int) -> float:
    return math.log(math.fsum(math.exp(k * float(log_beta)) for k in range(terms)))


@pytest.mark.parametrize("terms", [1, 2, 3, 17, 128, 10_000])
def test_lookahead_is_the_sum_of_the_powers(terms):
    for log_beta in np.array(LOG_BETAS, np.float32):
        # the ratio has a few roundings, which the logarithm turns into absolute ones
        assert near(log_geometric_sum(log_beta, terms), summed(log_beta, terms), 4 * ULP), log_beta


@settings(max_examples=200, deadline=None)
@given(st.floats(-80, 0, width=32), st.integers(1, 300))
def test_lookahead_of_any_beta(log_beta, terms):
    assert near(log_geometric_sum(np.float32(log_beta), terms), summed(log_beta, terms), 4 * ULP)


def test_lookahead_at_the_ends():
    assert log_geometric_sum(np.float32(0), 1000) == np.float32(math.log(1000))
    assert log_geometric_sum(np.float32(-np.inf), 1000) == 0  # 1 + 0 + 0 + ...
    ends = np.array([0, -np.inf], np.float32)
    with np.errstate(all="raise"):
        score = retention_score(ends, np.array([3, 3]), seen=10, lookahead=1000)
    assert score.tolist() == [np.float32(math.log(1000)), -np.inf]


def test_age_counts_from_two():
    score = retention_score(np.full(3, -0.5, np.float32), np.array([9, 8, 0]), seen=10)
    assert score.tolist() == [-1.0, -1.5, -5.5]  # ages 2, 3 and 11


def test_hand_computed_lookahead():
    half = np.log(np.float32(0.5))
    # β = 1/2, age 3, K = 2: 1/8 + 1/16
    assert near(retention_score(half, np.array(6), seen=8, lookahead=2), math.log(3 / 16), 4 * ULP)


@settings(max_examples=200, deadline=None)
@given(st.floats(-100, 0, width=32), st.integers(0, 10**6), st.integers(1, 10**6))
def test_single_step_is_one_rounded_product(log_beta, position, later):
    score = retention_score(np.float32([log_beta]), np.array([position], np.int32), position + later)
    assert score.dtype == np.float32
    assert score[0] == np.float32(later + 1) * np.float32(log_beta)


def test_good_tokens_are_told_apart_over_a_million_tokens():
    log_beta = np.float32([-1.0e-6, -1.1e-6])  # β rounds to 1 in bfloat16 and almost does in float32
    score = retention_score(log_beta, np.zeros(2, np.int64), seen=2**20)
    assert near(score[0], -1.048577, 1e-7) and score[0] - score[1] > 0.1


@pytest.mark.parametrize("lookahead", [1, 64])
def test_shape_and_type(lookahead):
    log_beta = -np.random.default_rng(0).exponential(size=(3, 5)).astype(np.float16)
    score = retention_score(log_beta, np.broadcast_to(np.arange(5), (3, 5)), 5, lookahead)
    assert score.shape == (3, 5) and score.dtype == np.float32
    assert retention_score(log_beta[:0], np.zeros((0, 5), int), 5, lookahead).shape == (0, 5)
    assert np.isnan(retention_score(np.float32([np.nan]), np.array([0]), 1, lookahead)).all()


@pytest.mark.parametrize("logit", [0, 1, -1, 10, 18, -18, 60, -60, 88, 100, -100, 1e4, -1e4])
def test_log_sigmoid(logit):
    with localcontext() as context, np.errstate(over="raise", invalid="raise"):
        context.prec = 60
        exact = -(1 + (-Decimal(logit)).exp()).ln() if abs(logit) < 1000 else Decimal(min(logit, 0))
        assert near(log_sigmoid(np.float32(logit)), float(exact), SMALLEST)


def test_log_sigmoid_of_no_number():
    assert log_sigmoid(np.float32([np.inf, -np.inf])).tolist() == [0, -np.inf]
    assert np.isnan(log_sigmoid(np.float32(np.nan)))
