"""Tokens of one picture that see each other, in mlx-vlm's models that are told the types of tokens (Gemma 4).

Their code lets them only in the first pass of a conversation, whose mask is square. Here it holds in every
pass: what was read before is all visible, and inside a picture of the pass attention looks both ways.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from .bounded import Bounded

_OVERLAY, _BLOCKS = "_apply_blockwise_bidirectional_overlay", "_block_sequence_ids_for_mask"


def looks_both_ways(model: nn.Module) -> bool:
    """Whether a language model's own code has tokens of a picture see each other."""
    inner: Any = getattr(model, "model", None)
    there = hasattr(inner, _OVERLAY) and hasattr(inner, _BLOCKS)
    return there and getattr(inner.config, "use_bidirectional_attention", None) == "vision"


@contextlib.contextmanager
def both_ways(model: nn.Module, shared: Bounded | None) -> Iterator[None]:
    """For a pass of ``model`` into the cache whose layers share ``shared``; nothing for other models."""
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, _OVERLAY) or not hasattr(inner, _BLOCKS):
        yield
        return

    def overlay(base: mx.array, types: mx.array | None) -> mx.array:
        if types is None or types.shape[1] != base.shape[-2]:
            return base
        number = getattr(inner, _BLOCKS)(types)
        same = (number[:, :, None] == number[:, None, :]) & (number[:, :, None] != -1)
        older = mx.zeros((*same.shape[:2], base.shape[-1] - same.shape[2]), mx.bool_)
        found = base | mx.concatenate([older, same], axis=2)[:, None]
        reading = None if shared is None else shared.reading
        if reading is not None and any(base is made for made in reading.masks):
            reading.shown.append(found)
        return found

    vars(inner)[_OVERLAY] = overlay
    try:
        yield
    finally:
        del vars(inner)[_OVERLAY]


def attend(
    queries: mx.array,
    window: tuple[mx.array, mx.array],
    kept: tuple[mx.array, mx.array, mx.array | None] | None,
    mask: mx.array,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention (1, Hq, T, Dv) to all ``kept`` entries, padded (H, W, D), and by ``mask`` to a window's.

    ``window`` holds keys and values (1, H, r, D), ``mask`` (1, 1, T, r) tells what is visible of them.
    """
    keys, values = window
    heads, group, tokens = keys.shape[1], queries.shape[1] // keys.shape[1], queries.shape[2]
    if kept is not None:
        old_keys, old_values, real = kept
        keys = mx.concatenate([old_keys[None], keys], axis=2)
        values = mx.concatenate([old_values[None], values], axis=2)
        visible = mx.ones(old_keys.shape[:2], mx.bool_) if real is None else real
        before = mx.broadcast_to(visible[None, :, None], (1, heads, tokens, visible.shape[1]))
        now = mx.broadcast_to(mask, (1, heads, tokens, mask.shape[-1]))
        mask = mx.repeat(mx.concatenate([before, now], axis=3), group, axis=1)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
