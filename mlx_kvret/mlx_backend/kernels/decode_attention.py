"""Attention of few tokens over ragged entries; the twin is :func:`..attention.attend_reference`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import mlx.core as mx

from ...core.bits import Packing
from .launch import Kernel, Launch, Template, constant

if TYPE_CHECKING:
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
    pool = view.pool
    keys, values, batch = view.where()
    shape, heads, value_dim = queries.shape, keys.shape[1], values.shape[3]
    newest = view.keys.shape[2] * (shape[3] + value_dim) * queries.dtype.size
    shares = pieces((pool.capacity * pool.entry_bytes + newest) * heads, shape[0])
    attend, merge = _launches(
        shape, queries.dtype, heads, value_dim, shares, causal, sinks is not None, pool.forms
    )
    layer, offsets = constant(view.layer * heads, pool.heads + 1), pool.lookup.offsets
    scaling = constant(scale, dtype=mx.float32)
    partial, stats = attend(
        [queries, pool.keys, pool.values, pool.lookup.table, offsets, keys, values, batch, layer, scaling]
    )
    (attended,) = merge([partial, stats, offsets, batch, layer, scaling if sinks is None else sinks])
    return attended


@functools.lru_cache(1024)
def _launches(
    queries: tuple[int, ...],
    dtype: mx.Dtype,
    heads: int,
    value_dim: int,
    shares: int,
    causal: bool,
    sinks: bool,
    forms: tuple[Packing, Packing] | None,
) -> tuple[Launch, Launch]:
    """Both kernels for queries (R, Hq, T, Dk) and ``shares`` pieces of each row."""
    count, query_heads, tokens, key_dim = queries
    rows, parts = query_heads // heads * tokens, shares + heads - 1
    groups = row_groups(rows, key_dim, value_dim)
    simdgroups = max(SIMDGROUPS, groups)
    common: Template = {"V": value_dim, "R": rows, "TOKENS": tokens, "T": dtype}
    attend = _attend.prepared(
        [((count, parts, rows, value_dim), mx.float32), ((count, parts, rows, 2), mx.float32)],
        (shares, count, 1),
        simdgroups * 32,
        **common,
        D=key_dim,
        S=simdgroups,
        RG=groups,
        RB=-(-rows // groups),
        CAUSAL=causal,
        **stored(forms),
    )
    merge = _merge.prepared(
        [((count, query_heads, tokens, value_dim), dtype)],
        (1, query_heads * tokens, count),
        SIMDGROUPS * 32,
        **common,
        S=SIMDGROUPS,
        SINKS=sinks,
    )
    return attend, merge


def stored(forms: tuple[Packing, Packing] | None) -> Template:
    """How kept keys and values are stored: bits, 0 for floats, and groups."""
    if forms is None:
        return {"KB": 0, "KG": 32, "VB": 0, "VG": 32}
    keys, values = forms
    return {"KB": keys.bits, "KG": keys.group, "VB": values.bits, "VG": values.group}
