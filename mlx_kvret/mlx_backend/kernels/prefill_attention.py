"""Attention of chunks over ragged kept entries; the twin is :func:`..attention.attend_reference`, row by row.

Several rows take one launch, each its own tokens of it.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from ..view import Chunk, ChunkView, LayerView
from .decode_attention import stored
from .launch import Kernel, constant
from .launch import rows as host_rows

SIMDGROUPS = 8
ROWS = SIMDGROUPS * 8
TILE_BYTES = 16384
# head sizes that MLX's own attention computes without writing its scores to memory
FUSED = (64, 80, 128)
# larger ones do not fit into the kernel's registers
LARGEST = 256

_attend = Kernel(
    "prefill_attention",
    [
        *("queries", "keys", "values", "table", "offsets", "recent_keys", "recent_values"),
        *("batch", "layer", "scaling", "sinks"),
    ],
    ["attended"],
    header="common.metal",
    strided=True,
)
_together = Kernel(
    "chunk_rows",
    ["keys", "values", "window_keys", "window_values", "where", "tokens"],
    ["packed_keys", "packed_values"],
    strided=True,
)


def prefill_attention(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool,
    sinks: mx.array | None,
) -> mx.array:
    """As :func:`..attention.attend`, for any number of tokens, without a mask and without padding."""
    key_dim, value_dim = queries.shape[3], view.values.shape[3]
    fused = key_dim == value_dim and key_dim in FUSED and view.pool.forms is None
    if fused or max(key_dim, value_dim) > LARGEST:
        return by_head(queries, view, scale, causal, sinks)
    return tiled(queries, view, scale, causal, sinks)


def by_head(
    queries: mx.array, view: LayerView, scale: float, causal: bool, sinks: mx.array | None
) -> mx.array:
    """MLX's own attention, one KV head after the other at its own length, as floats.

    Copying the kept entries together costs 3 passes over them, against one for every 32 query rows in
    attention itself. Lengths come to the host, once for a whole chunk.
    """
    pool, group = view.pool, queries.shape[1] // view.kv_heads
    offsets = view.host_offsets()
    mask = "causal" if causal and queries.shape[2] > 1 else None
    out = []
    for head in range(view.kv_heads):
        slots = pool.lookup.table[int(offsets[head]) : int(offsets[head + 1])]
        keys = mx.concatenate([pool.keys_at(slots)[None, None], view.keys[:, head : head + 1]], axis=2)
        values = mx.concatenate([pool.values_at(slots)[None, None], view.values[:, head : head + 1]], axis=2)
        own = slice(head * group, (head + 1) * group)
        # MLX aligns a causal mask with the end of the keys: all kept entries are visible
        out.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, own],
                keys,
                values,
                scale=scale,
                mask=mask,
                sinks=None if sinks is None else sinks[own],
            )
        )
    return mx.concatenate(out, axis=1)


def tiled(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool,
    sinks: mx.array | None,
) -> mx.array:
    """The kernel for one row: keys and values are read once for every ``ROWS`` query rows of their head."""
    tokens, end = queries.shape[2], view.keys.shape[2]
    rows = (Chunk(0, view.slabs[0], 0, end, tokens),)
    chunks = ChunkView(view.pool, view.layer, view.keys, view.values, rows)
    return tiled_rows(queries, chunks, scale, causal, sinks)


@functools.lru_cache(1)
def _told(rows: tuple[Chunk, ...]) -> mx.array:
    """Where rows stand, which is the same for all layers."""
    return host_rows(
        np.array([[row.slab, row.begin, row.end, row.tokens, row.index] for row in rows], np.int32)
    )


def tiled_rows(
    queries: mx.array,
    chunks: ChunkView,
    scale: float,
    causal: bool,
    sinks: mx.array | None,
) -> mx.array:
    """The kernel for rows: zeros for queries (R, Hq, T, Dk) that are padding, which are not even read."""
    pool, lookup, rows = chunks.pool, chunks.pool.lookup, chunks.rows
    count, query_heads, tokens, key_dim = queries.shape
    heads, value_dim = chunks.keys.shape[1], chunks.values.shape[3]
    entry = (key_dim + value_dim) * queries.dtype.size
    whole = len(rows) == count and all(row.tokens == tokens for row in rows)
    told = _told(rows)
    # of an empty pool nothing is read
    stored_rows = (pool.keys, pool.values, lookup.table) if pool.capacity else (*chunks.pair(rows[0]), told)
    (attended,) = _attend(
        [
            *(queries, *stored_rows, lookup.offsets, chunks.keys, chunks.values, told),
            constant(chunks.layer * heads, pool.heads + 1),
            constant(scale, dtype=mx.float32),
            constant(0, dtype=mx.float32) if sinks is None else sinks,
        ],
        [((count, query_heads, tokens, value_dim), queries.dtype)],
        (-(-query_heads // heads * tokens // ROWS), heads, len(rows)),
        SIMDGROUPS * 32,
        None if whole else 0,
        T=queries.dtype,
        D=key_dim,
        V=value_dim,
        N=max(n for n in (8, 16, 32) if n == 8 or n * entry <= TILE_BYTES),
        S=SIMDGROUPS,
        CAUSAL=causal,
        SINKS=sinks is not None,
        **stored(pool.forms),
    )
    return attended


def chunk_rows(
    keys: mx.array,
    values: mx.array,
    windows: tuple[mx.array, mx.array] | None,
    where: mx.array,
    tokens: int,
) -> tuple[mx.array, mx.array]:
    """Newest tokens of rows (1, H, ``tokens``, D), each row's behind one another's.

    ``keys`` and ``values`` (R, H, T, D) are new, ``windows`` hold what came before (slabs, H, room, D).
    ``where`` (tokens, 2) int32 is the row of what is new, or -1 less a slab, and a place there.
    """
    heads, key_dim, value_dim = keys.shape[1], keys.shape[3], values.shape[3]
    packed_keys, packed_values = _together(
        [keys, values, *(windows or (keys, values)), where, constant(tokens)],
        [((1, heads, tokens, width), keys.dtype) for width in (key_dim, value_dim)],
        (-(-tokens // SIMDGROUPS), heads, 1),
        SIMDGROUPS * 32,
        D=key_dim,
        V=value_dim,
        S=SIMDGROUPS,
    )
    return packed_keys, packed_values
