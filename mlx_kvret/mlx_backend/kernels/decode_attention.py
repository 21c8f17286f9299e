"""Attention of few tokens over ragged entries; the twin is :func:`..attention.attend_reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .launch import Kernel, Template, constant

if TYPE_CHECKING:
    from ..pool import Pool
    from ..view import LayerView

MAX_TOKENS = 8
SIMDGROUPS = 8
# keys and values for a threadgroup: its partial result is a few hundredths of them
PIECE_BYTES = 65536
# where that makes too few threadgroups to keep a GPU busy, pieces are smaller
SMALL_PIECE, FEW_PIECES = 16384, 32
MAX_PIECES = 128  # threadgroups that keep any GPU of the family busy
ROW_FLOATS = 64  # registers of a lane for the queries and results of its rows
# of heads that large more rows spill
LARGE, LARGE_ROWS = 128, 4
MAX_ROW_GROUPS = 16

_attend = Kernel(
    "decode_attention",
    [
        *("queries", "keys", "values", "table", "offsets", "recent_keys", "recent_values"),
        *("batch", "layer", "scaling"),
    ],
    ["partial", "stats"],
    header="common.metal",
    strided=True,
)
_merge = Kernel(
    "merge_partials",
    ["partial", "stats", "offsets", "batch", "layer", "sinks"],
    ["attended"],
    header="common.metal",
    strided=True,
)


def pieces(nbytes: int, rows: int = 1) -> int:
    """Threadgroups for each of a batch's rows, whose keys and values take ``nbytes`` in a layer.

    An estimate by the host will do.
    """
    least = min(FEW_PIECES // rows, nbytes // SMALL_PIECE)
    return max(1, min(MAX_PIECES // rows, max(nbytes // PIECE_BYTES, least)))


def row_groups(rows: int, key_dim: int, value_dim: int) -> int:
    """Simdgroups, a power of 2, that share out the query rows of a KV head, as registers allow."""
    lane = -(-key_dim // 32) + -(-value_dim // 32)
    each = max(1, ROW_FLOATS // lane)
    if max(key_dim, value_dim) >= LARGE:
        each = min(each, LARGE_ROWS)
    return 1 << (-(-rows // each) - 1).bit_length()


def fits(rows: int, key_dim: int, value_dim: int) -> bool:
    """Whether one threadgroup can hold all query ``rows`` of a KV head."""
    return row_groups(rows, key_dim, value_dim) <= MAX_ROW_GROUPS


def decode_attention(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool,
    sinks: mx.array | None,
) -> mx.array:
    """As :func:`..attention.attend`, for at most ``MAX_TOKENS`` tokens.

    A threadgroup reads its keys and values once, as they are stored. No length comes to the host: each works
    out its share of a row's entries in the layer from ``offsets``, and partial results are merged by
    log-sum-exp (Flash-Decoding).
    """
    pool, heads = view.pool, view.kv_heads
    count, query_heads, tokens, key_dim = queries.shape
    value_dim, rows = view.values.shape[-1], query_heads // heads * tokens
    groups = row_groups(rows, key_dim, value_dim)
    kept = sum(a.shape[-1] * a.dtype.size for a in (pool.keys, pool.values))
    newest = view.keys.shape[2] * (key_dim + value_dim) * queries.dtype.size
    shares = pieces((pool.capacity * kept + newest) * heads, count)
    parts = shares + heads - 1
    keys, values, batch = view.placed()
    layer = constant(view.head, pool.heads + 1)
    shape: Template = {"V": value_dim, "R": rows, "TOKENS": tokens, "T": queries.dtype}
    partial, stats = _attend(
        [
            *(queries, pool.keys, pool.values, pool.lookup.table, pool.lookup.offsets),
            *(keys, values, batch, layer, constant(scale, dtype=mx.float32)),
        ],
        [((count, parts, rows, value_dim), mx.float32), ((count, parts, rows, 2), mx.float32)],
        (shares, count, 1),
        max(SIMDGROUPS, groups) * 32,
        **shape,
        D=key_dim,
        S=max(SIMDGROUPS, groups),
        RG=groups,
        RB=-(-rows // groups),
        CAUSAL=causal,
        **stored(pool),
    )
    (attended,) = _merge(
        [
            *(partial, stats, pool.lookup.offsets, batch, layer),
            constant(0, dtype=mx.float32) if sinks is None else sinks,
        ],
        [((count, query_heads, tokens, value_dim), queries.dtype)],
        (1, query_heads * tokens, count),
        SIMDGROUPS * 32,
        **shape,
        S=SIMDGROUPS,
        SINKS=sinks is not None,
    )
    return attended


def stored(pool: Pool) -> Template:
    """How kept keys and values are stored: bits, 0 for floats, and groups."""
    if pool.forms is None:
        return {"KB": 0, "KG": 32, "VB": 0, "VG": 32}
    keys, values = pool.forms
    return {"KB": keys.bits, "KG": keys.group, "VB": values.bits, "VG": values.group}
