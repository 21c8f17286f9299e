"""What kernels attend to in the tests: ragged heads, rows in any order, NaN where nothing is to be read."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from mlx_kvret.core.bits import packings
from mlx_kvret.cuda_backend.pool import Pool, listing
from mlx_kvret.cuda_backend.view import Chunks, ChunkView, LayerView, Places

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# what is interpreted rounds to bfloat16 by cutting off
HALF = torch.float16 if INTERPRETED else torch.bfloat16


def random_view(
    rows: int,
    heads: int,
    places: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    capacity: int = 60,
    kv_bits: Any = None,
    first: float | None = None,
) -> LayerView:
    """Layer 1 of 3 with ragged heads, some of them empty; what must not be read is NaN.

    Rows stand in a pool with free slabs, in another order, and their windows have lengths of their own. The
    first head has the share ``first`` of its layer's entries, if given, else any.
    """
    rng = np.random.default_rng(rows * 31 + heads)
    layers, slabs = 3, rows + 2
    size = layers * heads
    pool = Pool(slabs, 1, size, DEVICE, packings(kv_bits, key_dim, value_dim))
    shape = (slabs, heads, places + 7)
    keys, values = (torch.randn(*shape, dim).to(dtype) for dim in (key_dim, value_dim))
    pool.grow(capacity, keys, values)
    share = rng.dirichlet([0.3] * size, slabs) * 0.8
    # the layer's second head is empty
    share[:, heads + 1 : heads + 2] = 0
    if first is not None:
        share[:] = 0.1 / size
        share[:, heads : 2 * heads] = [0.7 * first] + [0.7 * (1 - first) / (heads - 1)] * (heads - 1)
    for index, own in enumerate(share):
        slab = pool.slab(index)
        local = rng.choice(size + 1, len(slab.owner) - 1, p=[*own, 1 - own.sum()])
        slab.owner[:-1] = torch.from_numpy(local).to(DEVICE)
        table, offsets = listing(slab.owner[None], size, len(slab.table))
        pool.take({"table": table, "offsets": offsets}, [index])
    used = pool.owner < size
    for which, (array, dim) in enumerate(((pool.keys, key_dim), (pool.values, value_dim))):
        stored = pool.stored(which, torch.randn(*used.shape, dim).to(dtype))
        # NaN in any type, as scales too
        array.view(torch.uint8).fill_(255)
        array[used] = stored[used]
    if rows == 1:
        return LayerView(pool, 1, 1, keys[1:2, :, :places], values[1:2, :, :places])
    which, lengths = rng.permutation(slabs)[:rows], rng.integers(0, places, rows)
    for slab, length in enumerate(np.full(slabs, -1)):
        if slab in which:
            length = lengths[list(which).index(slab)]
        keys[slab, :, length + 1 :], values[slab, :, length + 1 :] = torch.nan, torch.nan
    numbers = torch.from_numpy(np.stack([which, lengths, lengths + 1, lengths, lengths + 99, lengths + 99]))
    return LayerView(pool, 0, 1, keys, values, Places(pool, numbers, DEVICE))


def random_chunks(
    numbers: list[tuple[int, int, int]], key_dim: int = 16, value_dim: int = 24, kv_bits: Any = None
) -> tuple[ChunkView, torch.Tensor]:
    """Rows in any order of slabs with (newest tokens, those that ask, their first place); queries for them.

    Of the queries' rows every other one does not ask. What is not to be read is NaN.
    """
    rows, heads, group = len(numbers), 2, 3
    kept = random_view(rows + 1, heads, 9, key_dim, value_dim, torch.float32, 30, kv_bits)
    slabs = np.random.default_rng(rows).permutation(rows + 3)[:rows].tolist()
    begins = np.cumsum([0, *(length for length, _, _ in numbers)]).tolist()
    keys, values = (torch.randn(1, heads, begins[-1], dim) for dim in (key_dim, value_dim))
    told = [
        (slab, begin, length, tokens, first, 1 + 2 * row)
        for row, ((length, tokens, first), slab, begin) in enumerate(
            zip(numbers, slabs, begins, strict=False)
        )
    ]
    most = max(tokens + first for _, tokens, first in numbers)
    queries = torch.full((2 * rows + 1, heads * group, most, key_dim), torch.nan)
    for _, _, _, tokens, first, row in told:
        queries[row, :, first : first + tokens] = torch.randn(heads * group, tokens, key_dim)
    return ChunkView(kept.pool, 1, keys, values, Chunks(told, DEVICE)), queries
