"""Attention of one layer over its kept entries and its newest tokens, in plain MLX.

Kept entries are ragged: every KV head of every row has its own number of them, from 0 up. They are all
visible; among the step's own tokens attention is causal. One softmax runs over both.
"""

from __future__ import annotations

import mlx.core as mx

from . import kernels
from .kernels.attention import attend as attend_with_kernels
from .kernels.prefill_attention import LARGEST, by_head, tiled_rows
from .lookup import Part
from .view import ChunkView, LayerView

# from so many tokens on copying keys together costs less than copying scores
MANY = 8


def attend(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool = True,
    sinks: mx.array | None = None,
) -> mx.array:
    """Softmax attention (R, Hq, T, Dv) of ``queries`` (R, Hq, T, Dk); windows end with their tokens.

    Several rows have one token each. ``sinks`` (Hq,) are logits of a null entry, as in
    ``mx.fast.scaled_dot_product_attention``.
    """
    tokens = queries.shape[2]
    if view.pool.capacity == 0:
        # nothing was ever kept: the windows are all there is
        mask = "causal" if causal and tokens > 1 else view.bias
        if isinstance(mask, mx.array):
            mask = mask.astype(queries.dtype)
        return mx.fast.scaled_dot_product_attention(
            queries, view.keys, view.values, scale=scale, mask=mask, sinks=sinks
        )
    types = {queries.dtype, view.keys.dtype, view.values.dtype}
    chosen = by_head if tokens > MANY else attend_reference

    def plain() -> mx.array:
        return chosen(queries, view, scale, causal, sinks)

    if not kernels.enabled():
        return plain()
    if not kernels.attention_supported(types, view.keys.shape[-1], view.values.shape[-1]):
        return plain()
    return kernels.served(lambda: attend_with_kernels(queries, view, scale, causal, sinks), plain)


def attend_rows(
    queries: mx.array,
    chunks: ChunkView,
    scale: float,
    causal: bool = True,
    sinks: mx.array | None = None,
) -> mx.array:
    """As :func:`attend` for chunks of several rows: ``queries`` (R, Hq, T, Dk), zeros for what is padding."""
    keys, values = chunks.keys, chunks.values
    types, widths = {queries.dtype, keys.dtype, values.dtype}, (keys.shape[3], values.shape[3])

    def plain() -> mx.array:
        parts = {}
        for row in chunks.rows:
            own = queries[row.index : row.index + 1, :, : row.tokens]
            out = attend(own, chunks.view(row), scale, causal, sinks)
            parts[row.index] = mx.pad(out, [(0, 0), (0, 0), (0, queries.shape[2] - row.tokens), (0, 0)])
        nothing = mx.zeros((1, *queries.shape[1:3], widths[1]), queries.dtype)
        return mx.concatenate([parts.get(index, nothing) for index in range(len(queries))])

    fits = len(chunks.rows) > 1 and max(widths) <= LARGEST and kernels.enabled()
    if not (fits and kernels.attention_supported(types, *widths)):
        return plain()
    return kernels.served(lambda: tiled_rows(queries, chunks, scale, causal, sinks), plain)


def attend_reference(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool = True,
    sinks: mx.array | None = None,
) -> mx.array:
    """:func:`attend` in plain MLX."""
    heads = view.kv_heads
    rows, query_heads, tokens, _ = queries.shape
    # the query heads of a KV head stand below each other: one product reads K and V once for all of them
    grouped = queries.reshape(rows, heads, query_heads // heads * tokens, -1) * scale
    bias = view.bias
    if causal and tokens > 1:
        bias = _causal_bias(tokens, view.keys.shape[2], query_heads // heads)
    if sinks is not None:
        sinks = mx.broadcast_to(mx.repeat(sinks, tokens).reshape(1, heads, -1, 1), (*grouped.shape[:3], 1))

    parts, place = view.pool.lookup.parts(view.head, heads, view.slabs)
    if parts[0].members is None:
        joined = _attend(grouped, view, parts[0], view.pair, bias, sinks)
    else:
        out = []
        for part in parts:
            at = part.members
            assert at is not None
            own = bias if bias is None or bias.ndim == 2 else bias[at[0], 0]
            pair = view.keys[at], view.values[at]
            own_sinks = None if sinks is None else sinks[at]
            out.append(_attend(grouped[at], view, part, pair, own, own_sinks))
        joined = mx.concatenate(out)
        joined = joined if place is None else joined[place]
    return joined.reshape(rows, query_heads, tokens, -1)


def _attend(
    queries: mx.array,
    view: LayerView,
    part: Part,
    newest: tuple[mx.array, mx.array],
    bias: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """The heads of ``part``: scaled queries (..., G·T, Dk) to (..., G·T, Dv)."""
    keys, values = newest
    width, length = part.width, keys.shape[-2]
    scores = queries @ keys.swapaxes(-1, -2)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if width:
        old = queries @ view.pool.keys_at(part.slots).swapaxes(-1, -2)
        old = old if part.real is None else mx.where(part.real[..., None, :], old, -mx.inf)
        scores = mx.concatenate([old, scores], axis=-1)
    if sinks is not None:
        scores = mx.concatenate([scores, sinks.astype(scores.dtype)], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    recent = weights[..., width : width + length] @ values
    return recent + weights[..., :width] @ view.pool.values_at(part.slots) if width else recent


def _causal_bias(tokens: int, length: int, group: int) -> mx.array:
    """0 or -inf (G·T, length) for the last ``tokens`` of a window of ``length``."""
    last_seen = mx.arange(length - tokens, length)
    bias = mx.where(last_seen[:, None] >= mx.arange(length), 0.0, -mx.inf)
    return mx.tile(bias, (group, 1))
