"""The tests' own measure of rounding: another order of summing passes, a real fault does not."""

import numpy as np
import pytest
from rounding import EPS, assert_near, assert_norm_near
from training.attention_terms import attention_terms

RNG = np.random.default_rng(0)
# rows whose sum is 0 but for what is left over: the worst that can happen to an absolute tolerance
HALF = RNG.normal(size=(50, 400)) * 10.0 ** RNG.integers(-3, 6, (50, 1))
TERMS = np.concatenate([HALF, -HALF, RNG.normal(size=(50, 1))], 1).astype(np.float32)
EXACT, SIZE = TERMS.astype(np.float64).sum(1), np.abs(TERMS).astype(np.float64).sum(1)
ROUNDINGS = 32


@pytest.mark.parametrize("order", range(20))
def test_any_order_of_summing_passes(order):
    shuffled = TERMS[:, np.random.default_rng(order).permutation(TERMS.shape[1])]
    for found in (
        shuffled.sum(1),
        np.cumsum(shuffled, 1)[:, -1],
        np.add.reduceat(shuffled, [0, 300, 500], 1).sum(1),
    ):
        assert_near(found, EXACT, ROUNDINGS, SIZE)
        assert_norm_near(found, EXACT, 0, SIZE, ROUNDINGS)


@pytest.mark.parametrize("row", [0, 7, 49])
def test_a_fault_of_a_hundred_thousandth_of_what_was_summed_does_not(row):
    for fault in (1e-5, -1e-5):
        found = TERMS.sum(1)
        found[row] += fault * SIZE[row]
        with pytest.raises(AssertionError, match="roundings of float32 apart"):
            assert_near(found, EXACT, ROUNDINGS, SIZE)
    found = TERMS.sum(1) + 1e-5 * SIZE
    with pytest.raises(AssertionError, match="is allowed"):
        assert_norm_near(found, EXACT, 0, SIZE, ROUNDINGS)


@pytest.mark.parametrize("dtype", EPS)
def test_one_rounding_is_half_of_eps(dtype):
    near, far = 1 + EPS[dtype] / 2, 1 + 2.1 * EPS[dtype]
    assert_near([near, -near], [1, -1], 1, dtype=dtype)
    with pytest.raises(AssertionError):
        assert_near([near, -far], [1, -1], 2, dtype=dtype)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([np.nan, 1], [1, 1]),
        ([1, 1], [np.nan, 1]),
        ([np.inf, 1], [-np.inf, 1]),
        ([np.inf, 1], [1, 1]),
        ([1e-30, 0], [0, 0]),
        ([1, 1], [1, 1, 1]),
        ([[1]], [1]),
    ],
)
def test_what_no_rounding_explains(found, expected):
    with pytest.raises(AssertionError):
        assert_near(found, expected, 1e6)


def test_what_is_the_same_passes():
    assert_near([np.nan, -np.inf, 0, 3], [np.nan, -np.inf, 0, 3], 0)
    assert_near(2.0, 2.0, 0)


# ---------------------------------------------------------------- the terms of attention


def one_token(heads=2, groups=2, size=8):
    """What attention does to one token cancels in its gradients: they are exactly 0 but for the value's."""
    shapes = (2, heads * groups, 1, size), (2, heads, 1, size), (2, heads, 1, size)
    given = RNG.normal(size=shapes[0])
    inputs = [RNG.normal(size=shape) for shape in shapes] + [-np.ones((2, 1, heads))]
    return inputs, given, attention_terms(inputs, np.zeros((2, 1)), 0.3, given)


def test_the_gradient_of_one_token_may_only_round():
    (query, key, value, _), given, terms = one_token()
    of_logits = (given * np.repeat(value, 2, 1)).sum(-1, keepdims=True)
    # what float32 leaves over of direct - out: once the size of the larger, rounded
    left = np.float32(of_logits) * EPS["float32"]
    found = 0.3 * left * np.repeat(key, 2, 1)
    zero = np.zeros_like(query)
    assert np.linalg.norm(found) > 0
    assert_norm_near(found, zero, 1e-5, terms[1])
    for fault in (1e-4, 1e-3, 1):
        with pytest.raises(AssertionError):
            assert_norm_near(0.3 * fault * of_logits * np.repeat(key, 2, 1), zero, 1e-5, terms[1])


@pytest.mark.parametrize("window", [None, 3])
def test_terms_bound_what_is_summed(window):
    """No gradient, found by differences, exceeds its terms, and these are not out of all proportion."""
    inputs = [RNG.normal(size=s) for s in ((1, 2, 6, 3), (1, 1, 6, 3), (1, 1, 6, 2))] + [
        -RNG.random((1, 6, 1))
    ]
    starts, given = np.array([[0, 0, 0, 3, 3, 3]]), RNG.normal(size=(1, 2, 6, 2))

    def loss(values):
        query, key, value, fade = values
        row, column = np.arange(6)[:, None], np.arange(6)
        logits = 0.3 * query @ key.swapaxes(2, 3) + (row - column) * fade[..., 0][:, None, None]
        begin = np.maximum(starts[0], row[:, 0] - window + 1) if window else starts[0]
        weight = np.where((column <= row) & (column >= begin[:, None]), np.exp(logits), 0)
        return (weight / weight.sum(-1, keepdims=True) @ value * given).sum()

    terms = attention_terms(inputs, starts, 0.3, given, window=window)[1:]
    for which, bound in enumerate(terms):
        for index in np.ndindex(bound.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in inputs]
                moved[which][index] += step
                ends.append(loss(moved))
            gradient = abs(ends[0] - ends[1]) / 2e-6
            assert gradient <= bound[index] + 1e-6
        assert bound.max() < 100
