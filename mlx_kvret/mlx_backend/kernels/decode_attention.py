"""Attention of few tokens over ragged entries; the twin is :func:`..attention.attend_reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .launch import Kernel, Template, constant

if TYPE_CHECKING:
    from ..view import LayerView

MAX_TOKENS = 8
SIMDGROUPS = 8
PIECE_BYTES = (
    65536  # keys and values for a threadgroup, at least: its partial result is a few hundredths of them
)
MAX_PIECES = 128  # threadgroups that keep any GPU of the family busy
ROW_FLOATS = 64  # registers of a lane for the queries and results of its rows
MAX_ROW_GROUPS = 8
TILE_BYTES = 8192

ENTRIES = ["table", "offsets", "recent_keys", "recent_values", "layer", "scaling"]
_attend = Kernel(
    "decode_attention",
    ["queries", "keys", "values", *ENTRIES],
    ["partial", "stats"],
    header="common.metal",
    strided=True,
)
_merge = Kernel(
    "merge_partials",
    ["partial", "stats", "offsets", "recent_keys", "layer", "sinks"],
    ["attended"],
    header="common.metal",
    strided=True,
)


def pieces(nbytes: int) -> int:
    """Threadgroups that share a layer's ``nbytes`` of keys and values; an estimate by the host will do."""
    return max(1, min(MAX_PIECES, nbytes // PIECE_BYTES))


def row_groups(rows: int, key_dim: int, value_dim: int) -> int:
    """Simdgroups over which the query rows of a KV head are shared out, so that they fit into registers."""
    lane = -(-key_dim // 32) + -(-value_dim // 32)
    return -(-rows // max(1, ROW_FLOATS // lane))


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

    Every key and value is read once. No length comes to the host: each threadgroup works out its share of
    the layer's entries from ``offsets``, and partial results are merged by log-sum-exp (Flash-Decoding).
    """
    pool, heads = view.pool, view.kv_heads
    _, query_heads, tokens, key_dim = queries.shape
    value_dim, rows = view.values.shape[-1], query_heads // heads * tokens
    groups = row_groups(rows, key_dim, value_dim)
    simdgroups = SIMDGROUPS if groups == 1 else groups
    entry = (key_dim + value_dim) * queries.dtype.size
    shares = pieces((pool.capacity + view.keys.shape[2]) * heads * entry)
    layer = constant(view.first)
    shape: Template = {"V": value_dim, "R": rows, "TOKENS": tokens, "T": queries.dtype}
    partial, stats = _attend(
        [
            queries,
            pool.keys,
            pool.values,
            pool.lookup.table,
            pool.lookup.offsets,
            view.keys,
            view.values,
            layer,
            constant(scale, dtype=mx.float32),
        ],
        [((shares + heads - 1, rows, value_dim), mx.float32), ((shares + heads - 1, rows, 2), mx.float32)],
        (shares, 1, 1),
        simdgroups * 32,
        **shape,
        D=key_dim,
        S=simdgroups,
        RG=groups,
        RB=-(-rows // groups),
        N=max(1, TILE_BYTES // entry),
        CAUSAL=causal,
    )
    (attended,) = _merge(
        [
            partial,
            stats,
            pool.lookup.offsets,
            view.keys,
            layer,
            constant(0, dtype=mx.float32) if sinks is None else sinks,
        ],
        [((1, query_heads, tokens, value_dim), queries.dtype)],
        (1, query_heads * tokens, 1),
        SIMDGROUPS * 32,
        **shape,
        S=SIMDGROUPS,
        SINKS=sinks is not None,
    )
    return attended
