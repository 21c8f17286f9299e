"""Attention of one layer over its kept entries and its newest tokens, in plain MLX.

Kept entries are ragged: every KV head has its own number of them, from 0 up. They are all visible; among the
step's own tokens attention is causal. One softmax runs over both.
"""

from __future__ import annotations

import mlx.core as mx

from . import kernels
from .kernels.attention import attend as attend_with_kernels
from .kernels.prefill_attention import by_head
from .view import LayerView

# from so many tokens on copying keys together costs less than copying scores
MANY = 8


def attend(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool = True,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
) -> mx.array:
    """Softmax attention (1, Hq, T, Dv) of ``queries`` (1, Hq, T, Dk); the rectangle ends with their tokens.

    ``sinks`` (Hq,) are logits of a null entry, as in ``mx.fast.scaled_dot_product_attention``. Logits x are
    capped to softcap·tanh(x / softcap) if ``softcap`` is not 0.
    """
    tokens = queries.shape[2]
    if view.pool.capacity == 0 and not softcap:
        # nothing was ever kept: the rectangle is all there is
        mask = "causal" if causal and tokens > 1 else None
        return mx.fast.scaled_dot_product_attention(
            queries, view.keys, view.values, scale=scale, mask=mask, sinks=sinks
        )
    types = {queries.dtype, view.keys.dtype, view.values.dtype}
    if kernels.enabled() and kernels.attention_supported(types, view.keys.shape[-1], view.values.shape[-1]):
        return attend_with_kernels(queries, view, scale, causal, sinks, softcap)
    if tokens > MANY and not softcap:
        return by_head(queries, view, scale, causal, sinks)
    return attend_reference(queries, view, scale, causal, sinks, softcap)


def attend_reference(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool = True,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
) -> mx.array:
    """:func:`attend` in plain MLX."""
    heads = view.kv_heads
    _, query_heads, tokens, _ = queries.shape
    # the query heads of a KV head stand below each other: one product reads K and V once for all of them
    grouped = queries.reshape(heads, query_heads // heads * tokens, -1) * scale
    bias = _causal_bias(tokens, view.keys.shape[2], query_heads // heads) if causal and tokens > 1 else None
    if sinks is not None:
        sinks = mx.repeat(sinks, tokens).reshape(heads, -1, 1)

    out = [
        _attend(
            grouped[part],
            view,
            part,
            width,
            bias,
            None if sinks is None else sinks[part],
            softcap,
        )
        for part, width in view.pool.lookup.parts(view.first, heads)
    ]
    joined = out[0] if len(out) == 1 else mx.concatenate(out)
    return joined.reshape(1, query_heads, tokens, -1)


def _attend(
    queries: mx.array,
    view: LayerView,
    part: slice,
    width: int,
    bias: mx.array | None,
    sinks: mx.array | None,
    softcap: float,
) -> mx.array:
    """The heads of ``part``: scaled queries (heads, G·T, Dk) to (heads, G·T, Dv)."""
    scores = _capped(queries @ view.keys[0, part].swapaxes(1, 2), softcap)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if width:
        keys, values, real = view.kept(part.start, part.stop - part.start, width)
        old = _capped(queries @ keys.swapaxes(1, 2), softcap)
        old = old if real is None else mx.where(real[:, None], old, -mx.inf)
        scores = mx.concatenate([old, scores], axis=-1)
    if sinks is not None:
        scores = mx.concatenate([scores, sinks.astype(scores.dtype)], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    recent = weights[..., width : width + view.keys.shape[2]] @ view.values[0, part]
    return recent + weights[..., :width] @ values if width else recent


def _capped(logits: mx.array, softcap: float) -> mx.array:
    return softcap * mx.tanh(logits / softcap) if softcap else logits


def _causal_bias(tokens: int, length: int, group: int) -> mx.array:
    """0 or -inf (G·T, length) for the last ``tokens`` of a rectangle of ``length``."""
    last_seen = mx.arange(length - tokens, length)
    bias = mx.where(last_seen[:, None] >= mx.arange(length), 0.0, -mx.inf)
    return mx.tile(bias, (group, 1))
