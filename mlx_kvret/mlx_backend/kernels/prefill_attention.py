"""Attention of a chunk over ragged kept entries; the twin is :func:`..attention.attend_reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .decode_attention import stored
from .launch import Kernel, constant

if TYPE_CHECKING:
    from ..view import LayerView

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
        *("layer", "scaling", "sinks"),
    ],
    ["attended"],
    header="common.metal",
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
    """The kernel: keys and values are read once for every ``ROWS`` query rows of their head."""
    pool, lookup = view.pool, view.pool.lookup
    _, query_heads, tokens, key_dim = queries.shape
    value_dim = view.values.shape[3]
    entry = (key_dim + value_dim) * queries.dtype.size
    (attended,) = _attend(
        [
            *(queries, pool.keys, pool.values, lookup.table, lookup.offsets),
            *(view.keys, view.values, constant(view.first), constant(scale, dtype=mx.float32)),
            constant(0, dtype=mx.float32) if sinks is None else sinks,
        ],
        [((1, query_heads, tokens, value_dim), queries.dtype)],
        (-(-query_heads // view.kv_heads * tokens // ROWS), view.kv_heads, 1),
        SIMDGROUPS * 32,
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
