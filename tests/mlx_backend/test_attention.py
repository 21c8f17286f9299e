"""Attention over the pool and the recent window equals dense attention under a mask."""

import math

import mlx.core as mx
import numpy as np
import pytest
from rounding import assert_near

from mlx_kvret.mlx_backend.attention import attend
from mlx_kvret.mlx_backend.pool import Pool
from mlx_kvret.mlx_backend.view import LayerView

CASES = {
    "an empty head": [0, 5],
    "all empty": [0, 0, 0],
    "one entry": [1, 0, 1],
    "one head": [7],
    "even": [12, 12],
    "100 to 1": [300, 3, 3],
    "odd": [37, 5, 16, 1],
}


def filled(lengths, dim, value_dim, dtype, rng, layers=2, layer=1):
    """A pool whose layer ``layer`` has heads of these lengths, entries in random slots; and them by head."""
    heads = len(lengths)
    counts = [*rng.integers(0, 9, layer * heads), *lengths, *rng.integers(0, 9, (layers - layer - 1) * heads)]
    pool = Pool(1, layers * heads)
    capacity = max(1, math.ceil(sum(counts) / (layers * heads)) + 1)
    pool.grow(capacity, mx.zeros((1, dim), dtype), mx.zeros((1, value_dim), dtype))
    slots = rng.permutation(capacity * layers * heads)[: sum(counts)]
    owner = np.full(pool.owner.size, layers * heads, np.int32)
    owner[slots] = np.repeat(np.arange(layers * heads), counts)
    # what nobody owns must not be read: it would show
    junk = np.where(owner == layers * heads, 1e3, 0)[:, None]
    keys, values = rng.normal(size=(owner.size, dim)) + junk, rng.normal(size=(owner.size, value_dim)) + junk
    keys, values = mx.array(keys).astype(dtype), mx.array(values).astype(dtype)
    pool.restore(capacity, [keys, values, pool.retention, pool.position, mx.array(owner)])
    mine = [owner == layer * heads + head for head in range(heads)]
    return pool, [(as_numpy(keys)[m], as_numpy(values)[m]) for m in mine]


def as_numpy(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def dense(queries, kept, keys, values, scale, causal, sinks):
    """(Hq, T, D) queries over each head's kept entries and its recent window, one query at a time."""
    query_heads, tokens, _ = queries.shape
    group, length = query_heads // len(kept), keys.shape[1]
    out = np.zeros((query_heads, tokens, values.shape[2]))
    for head, t in np.ndindex(query_heads, tokens):
        old_keys, old_values = kept[head // group]
        end = length - tokens + t + 1 if causal else length
        k = np.r_[old_keys, keys[head // group, :end]]
        v = np.r_[old_values, values[head // group, :end]]
        logits = k @ queries[head, t] * scale
        null = [] if sinks is None else [sinks[head]]
        top = max([*logits, *null])
        weights = np.exp(logits - top)
        out[head, t] = weights @ v / (weights.sum() + np.exp(np.array(null) - top).sum())
    return out


def compare(
    lengths, group=2, tokens=1, recent=3, dim=8, value_dim=6, dtype=mx.float32, causal=True, sinks=False
):
    rng, heads = np.random.default_rng(1), len(lengths)
    pool, kept = filled(lengths, dim, value_dim, dtype, rng)
    q, k, v = (
        mx.array(rng.normal(size=(1, n, t, d))).astype(dtype)
        for n, t, d in ((heads * group, tokens, dim), (heads, recent, dim), (heads, recent, value_dim))
    )
    null = mx.array(rng.normal(size=heads * group)).astype(dtype) if sinks else None
    found = attend(q, LayerView(pool, 1, k, v), dim**-0.5, causal, null)
    assert found.dtype == dtype and found.shape == (1, heads * group, tokens, value_dim)
    arrays = (as_numpy(a[0]) for a in (k, v))
    expected = dense(
        as_numpy(q[0]), kept, *arrays, dim**-0.5, causal, None if null is None else as_numpy(null)
    )
    roundings = 64 if dtype == mx.float32 else 4
    assert_near(as_numpy(found[0]), expected, roundings, dtype=str(dtype).rpartition(".")[2])


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_lengths(lengths, tokens, sinks):
    compare(lengths, tokens=tokens, sinks=sinks)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_groups_and_steps(group, tokens):
    compare([9, 0, 30], group=group, tokens=tokens, recent=11)
    compare([4], group=group, tokens=tokens, recent=tokens)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_half_precision(dtype, dim):
    compare([70, 2, 0], group=4, tokens=2, recent=9, dim=dim, value_dim=dim, dtype=dtype, sinks=True)


def test_without_a_mask_all_tokens_are_visible():
    compare([5, 2], tokens=4, recent=6, causal=False)
