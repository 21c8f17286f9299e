"""Caches with any number of kept entries per head, and queries for them."""

import mlx.core as mx
import numpy as np

from mlx_kvret.core.bits import packings
from mlx_kvret.mlx_backend.gates import to_tensor
from mlx_kvret.mlx_backend.packing import pack
from mlx_kvret.mlx_backend.pool import Pool
from mlx_kvret.mlx_backend.view import LayerView
from mlx_kvret.mlx_backend.view import placed as where


def uniform(*shape, dtype=mx.float32):
    return mx.random.uniform(-1.0, 1.0, shape).astype(dtype)


def pool_with(lengths, key_dim, value_dim, dtype=mx.float32, free=3, seed=0, bits=None):
    """One group over all heads; head f holds ``lengths[f]`` entries in scattered slots, others are free.

    ``lengths`` of several slabs are a list of lists.
    """
    slabs = lengths if isinstance(lengths[0], list) else [lengths]
    heads, rng = len(slabs[0]), np.random.default_rng(seed)
    capacity = -(-(max(map(sum, slabs)) + free) // heads)
    forms = packings(bits, key_dim, value_dim)
    pool = Pool(1, heads, len(slabs), forms)
    pool.grow(capacity, mx.zeros((1, 1, 1, key_dim), dtype), mx.zeros((1, 1, 1, value_dim), dtype))
    slots = capacity * heads
    owner = np.full((len(slabs), slots + 1), heads, np.int32)
    for own, kept in zip(owner, slabs, strict=True):
        own[rng.permutation(slots)[: sum(kept)]] = np.repeat(np.arange(heads), kept)
    pool.keys, pool.values = (uniform(owner.size, width, dtype=dtype) for width in (key_dim, value_dim))
    if forms is not None:
        pool.keys, pool.values = pack(forms[0], pool.keys), pack(forms[1], pool.values)
    pool.position = mx.array(rng.integers(0, 1000, owner.size).astype(np.int32))
    pool.retention = uniform(owner.size)
    pool.owner = mx.array(owner.reshape(-1))
    pool.index()
    return pool


def as_floats(pool):
    """A pool that holds in float32 what this one stores."""
    held = []
    for which, array in enumerate((pool.keys, pool.values)):
        if pool.forms is None:
            held.append(array.astype(mx.float32))
            continue
        dtype = to_tensor(mx.zeros((1,), pool.dtype)).dtype
        codes, scale, bias = pool.forms[which].parts(np.array(array), dtype)
        held.append(mx.array((codes * scale + bias).reshape(len(codes), -1)))
    made = Pool(pool.groups, pool.size, pool.slabs)
    made.capacity = pool.capacity
    made.restore(pool.capacity, [*held, pool.retention, pool.position, pool.owner])
    made.lookup = pool.lookup
    return made


def view_with(
    lengths, recent, key_dim=64, value_dim=64, dtype=mx.float32, layer=1, layers=3, free=3, bits=None
):
    """The view of one layer whose heads hold ``lengths`` entries; the other layers' heads hold 2 each."""
    heads = len(lengths)
    all_lengths = [2] * heads * layers
    all_lengths[layer * heads : (layer + 1) * heads] = lengths
    pool = pool_with(all_lengths, key_dim, value_dim, dtype, free, bits=bits)
    room = recent + 5  # as in the cache, the recent window is a slice of something longer
    keys, values = (
        uniform(1, heads, room, key_dim, dtype=dtype),
        uniform(1, heads, room, value_dim, dtype=dtype),
    )
    return LayerView(pool, layer, keys[:, :, :recent], values[:, :, :recent])


def batch_with(
    lengths, recent, size=64, dtype=mx.float32, bits=None, spare=1, placed=True, layer=1, layers=2
):
    """One layer of rows with ``lengths`` (R, H) and ``recent`` (R,) tokens, on the last slabs, backwards."""
    rows, heads = len(lengths), len(lengths[0])
    slabs = [[3] * heads * layers for _ in range(rows + spare)]
    taken = tuple(reversed(range(spare, rows + spare)))
    for slab, kept in zip(taken, lengths, strict=True):
        slabs[slab][layer * heads : (layer + 1) * heads] = kept
    pool = pool_with(slabs, size, size, dtype, bits=bits)
    longest = max(recent)
    whole = [uniform(rows + spare, heads, longest + 3, size, dtype=dtype) for _ in range(2)]
    keys, values = (a[:, :, :longest][mx.array(taken)] for a in whole)
    real = mx.arange(longest) < mx.array(recent)[:, None]
    bias = mx.where(real, 0.0, -mx.inf)[:, None, None]
    batch = where([(s, s, n) for s, n in zip(taken, recent, strict=True)])
    given = {"windows": tuple(whole), "batch": batch} if placed else {}
    return LayerView(pool, layer, keys, values, taken, tuple(recent), bias, **given)
