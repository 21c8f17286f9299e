"""Caches with any number of kept entries per head, and queries for them."""

import mlx.core as mx
import numpy as np

from mlx_kvret.mlx_backend.pool import Pool
from mlx_kvret.mlx_backend.view import LayerView


def uniform(*shape, dtype=mx.float32):
    return mx.random.uniform(-1.0, 1.0, shape).astype(dtype)


def pool_with(lengths, key_dim, value_dim, dtype=mx.float32, free=3, seed=0):
    """One group over all heads; head f holds ``lengths[f]`` entries in scattered slots, others are free."""
    heads, rng = len(lengths), np.random.default_rng(seed)
    capacity = -(-(sum(lengths) + free) // heads)
    pool = Pool(1, heads)
    pool.grow(capacity, mx.zeros((1, 1, 1, key_dim), dtype), mx.zeros((1, 1, 1, value_dim), dtype))
    slots = capacity * heads
    owner = np.full(slots + 1, heads, np.int32)
    owner[rng.permutation(slots)[: sum(lengths)]] = np.repeat(np.arange(heads), lengths)
    pool.keys, pool.values = (
        uniform(slots + 1, key_dim, dtype=dtype),
        uniform(slots + 1, value_dim, dtype=dtype),
    )
    pool.position = mx.array(rng.integers(0, 1000, slots + 1).astype(np.int32))
    pool.retention = uniform(slots + 1)
    pool.owner = mx.array(owner)
    pool.index()
    return pool


def view_with(lengths, recent, key_dim=64, value_dim=64, dtype=mx.float32, layer=1, layers=3, free=3):
    """The view of one layer whose heads hold ``lengths`` entries; the other layers' heads hold 2 each."""
    heads = len(lengths)
    all_lengths = [2] * heads * layers
    all_lengths[layer * heads : (layer + 1) * heads] = lengths
    pool = pool_with(all_lengths, key_dim, value_dim, dtype, free)
    room = recent + 5  # as in the cache, the recent window is a slice of something longer
    keys, values = (
        uniform(1, heads, room, key_dim, dtype=dtype),
        uniform(1, heads, room, value_dim, dtype=dtype),
    )
    return LayerView(pool, layer, keys[:, :, :recent], values[:, :, :recent])
