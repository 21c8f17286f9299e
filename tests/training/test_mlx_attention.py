"""Fading attention and soft size in MLX against their naive twins in float64, and their memory."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EPS, assert_near, assert_norm_near

from mlx_kvret.mlx_backend.training.attention import PackedMask, decay_attention, naive_decay_attention
from mlx_kvret.mlx_backend.training.soft_size import naive_soft_size, soft_size
from training.attention_terms import attention_terms, soft_size_terms

SCALE = 0.3


def packed(tokens, batch=2, window=None):
    """One row of a single document, the last of three."""
    starts = np.zeros((batch, tokens), np.int64)
    for begin in (tokens // 3, tokens // 2 + 1):
        starts[-1, begin:] = begin
    return PackedMask(starts, window)


def random(*shape, seed=0):
    return mx.array(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32))


def tensors(groups=3, tokens=50, size=16, value=24, heads=2):
    log_beta = 3 * random(2, tokens, heads) + 2
    return [
        random(2, heads * groups, tokens, size),
        random(2, heads, tokens, size, seed=1),
        random(2, heads, tokens, value, seed=2),
        mx.minimum(log_beta, 0) - mx.log1p(mx.exp(-mx.abs(log_beta))),
    ]


def outcome(function, inputs):
    """Output and gradients under a random loss."""
    out = function(*inputs)
    weight = random(*out.shape, seed=7).astype(out.dtype)
    found = [out, *mx.grad(lambda x: (function(*x) * weight).sum())(inputs)]
    return [np.array(x.astype(mx.float64)) for x in found]


def compare(fast, naive, inputs, relative, terms):
    """``terms`` are the sizes of what is summed to the output and to its gradients, given one of it."""
    with mx.stream(mx.cpu):
        exact = outcome(naive, [x.astype(mx.float64) for x in inputs])
        sizes = terms(np.array(random(*exact[0].shape, seed=7)))
        for found, expected, size in zip(outcome(fast, inputs), exact, sizes, strict=True):
            assert_norm_near(found, expected, relative, size)


@pytest.mark.parametrize("elements", [1, 5000, 1 << 20])
@pytest.mark.parametrize("tokens, groups, size, value", [(50, 3, 16, 24), (63, 1, 7, 5), (1, 2, 8, 8)])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_equals_naive(tokens, groups, size, value, elements, window):
    rest = (packed(tokens, window=window), SCALE)
    inputs = tensors(groups, tokens, size, value)
    compare(
        lambda *x: decay_attention(*x, *rest, elements=elements),
        lambda *x: naive_decay_attention(*x, *rest),
        inputs,
        1e-5,
        lambda given: attention_terms(inputs, rest[0].starts, SCALE, given, window=window),
    )


@pytest.mark.parametrize("elements", [1, 5000, 1 << 20])
@pytest.mark.parametrize("window", [None, 7])
def test_later_tokens_of_a_picture_have_not_faded(elements, window):
    mask = packed(50, window=window)
    ends = np.tile(np.arange(1, 51), (2, 1))
    for row, first, last in ((0, 3, 12), (0, 20, 50), (1, 16, 21), (1, 0, 2)):
        ends[row, first:last] = last
    mask, inputs = replace(mask, ends=ends), tensors()
    compare(
        lambda *x: decay_attention(*x, mask, SCALE, elements=elements),
        lambda *x: naive_decay_attention(*x, mask, SCALE),
        inputs,
        1e-5,
        lambda given: attention_terms(inputs, mask.starts, SCALE, given, window=window, ends=ends),
    )
    query, key, value, _ = tensors()
    out = decay_attention(query, key, value, mx.full((2, 50, 2), -1e4), mask, SCALE, elements=elements)
    alone = mx.softmax(SCALE * query[0, 0, 3] @ key[0, 0, 3:12].T, -1) @ value[0, 0, 3:12]
    assert np.abs(np.array(out[0, 0, 3] - alone)).max() < 1e-5


@pytest.mark.parametrize("window", [None, 7])
def test_a_block_takes_the_keys_that_it_sees_and_no_others(window):
    ends = np.arange(1, 51)[None].copy()
    ends[0, 20:33] = 33
    mask = PackedMask(np.repeat([0, 18], [18, 32])[None], window, ends)
    for at in range(50):
        query = slice(at, at + 1)
        seen, keys = np.flatnonzero(mask.block(query, slice(0, 50))), mask.keys(query)
        assert (keys.start, keys.stop) == (seen[0], seen[-1] + 1)


@pytest.mark.parametrize("decays", [True, False])
def test_sinks_and_no_gates(decays):
    rest = (packed(50), SCALE, mx.linspace(-3, 5, 6))
    inputs = tensors() if decays else tensors()[:3]
    gate = () if decays else (None,)
    compare(
        lambda *x: decay_attention(*x, *gate, *rest, elements=9000),
        lambda *x: naive_decay_attention(*x, *gate, *rest),
        inputs,
        1e-5,
        lambda given: attention_terms(inputs, rest[0].starts, SCALE, given, rest[2]),
    )


@pytest.mark.parametrize("dtype, tolerance", [(mx.bfloat16, 0.01), (mx.float16, 2e-3)])
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    *half, log_beta = tensors()
    half = [x.astype(dtype) for x in half]
    found = decay_attention(*half, log_beta, packed(50), SCALE)
    expected = naive_decay_attention(*(x.astype(mx.float32) for x in half), log_beta, packed(50), SCALE)
    assert found.dtype == dtype
    assert mx.linalg.norm((found - expected).reshape(-1)) <= tolerance * mx.linalg.norm(expected.reshape(-1))


def test_exact_at_128k_tokens():
    """Late queries with quickly decaying entries, where t·log β loses what (t - i)·log β needs."""
    tokens, last = 1 << 17, 64
    mask = PackedMask(np.zeros((1, tokens), np.int64))
    mask.starts[:] = tokens - 4096
    mask.starts[:, : tokens - 4096] = np.arange(tokens - 4096)  # earlier tokens see themselves alone
    value, log_beta = random(1, 1, tokens, 1), -mx.abs(random(1, tokens, 1))
    zero = mx.zeros((1, 1, tokens, 1))
    out = decay_attention(zero, zero, value, log_beta, mask, SCALE, elements=1 << 26)
    age = np.arange(4096 - last, 4096)[:, None] - np.arange(4096)
    seen = np.array(log_beta)[0, -4096:, 0].astype(np.float64)
    weight = np.where(age >= 0, np.exp(age * seen), 0)
    expected = weight / weight.sum(1, keepdims=True) @ np.array(value)[0, 0, -4096:]
    # of values and weights; ages of up to 4,096 make logits of a few
    assert_near(
        np.array(out)[0, 0, -last:],
        expected,
        64,
        weight / weight.sum(1, keepdims=True) @ np.abs(value)[0, 0, -4096:],
    )


SIZES = [(2, 2, 130), (1, 1, 1), (1, 3, 64), (2, 1, 65)]


@pytest.mark.parametrize("batch, heads, tokens", SIZES)
@pytest.mark.parametrize("elements", [1, 3000, None])
def test_soft_size_equals_naive(batch, heads, tokens, elements):
    mask = packed(tokens, batch)
    log_beta = -mx.exp(2 * random(batch, heads, tokens) - 3)
    compare(
        lambda x: soft_size(x, mask, elements),
        lambda x: naive_soft_size(x, mask),
        [log_beta],
        1e-5,
        lambda given: soft_size_terms(log_beta, mask.starts, given),
    )


@given(st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=40), st.integers(0, 39))
@settings(max_examples=40, deadline=None)
def test_soft_size_is_between_one_and_all(values, cut):
    starts = np.zeros((1, len(values)), np.int64)
    starts[0, cut:] = cut
    counted = np.arange(len(values)) - starts + 1
    size = np.array(soft_size(mx.array([[values]]), PackedMask(starts)))[0]
    # each of up to 40 powers of β may be rounded
    assert (size >= 1 - 40 * EPS["float32"]).all()
    assert (size <= counted * (1 + 40 * EPS["float32"])).all()


def peak(tokens, function):
    """Most bytes at once beyond what lies there already, over one backward pass."""
    mx.eval(inputs := tensors(1, tokens, 4, 4))
    mask = packed(tokens)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda x: function(x, mask).sum())(inputs))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: decay_attention(*x, mask, SCALE, elements=1 << 16) ** 2,
        lambda x, mask: soft_size(x[3].swapaxes(1, 2), mask, 1 << 16),
    ],
)
def test_memory_of_the_backward_pass_is_linear(function):
    sizes = {tokens: peak(tokens, function) for tokens in (1024, 4096)}
    # at most four times as much for four times the tokens; the T×T matrices would take 16 times as much
    assert sizes[4096] <= 4 * sizes[1024]
    whole = 4 * 2 * 2 * 4096**2
    assert sizes[4096] < whole / 8
