"""Packed entries as MLX arrays: rows of words as of :mod:`mlx_kvret.core.bits`, whose code is the twin."""

from __future__ import annotations

import mlx.core as mx

from ..core.bits import Packing


def pack(form: Packing, x: mx.array) -> mx.array:
    """Vectors (..., width) as rows (..., words) uint32."""
    words, scales, biases = mx.quantize(x, form.group, form.bits)
    pairs = mx.stack([scales, biases], axis=-1).reshape(*x.shape[:-1], -1)
    return mx.concatenate([words, pairs.view(mx.uint32)], axis=-1)


def unpack(form: Packing, rows: mx.array, dtype: mx.Dtype) -> mx.array:
    """Vectors (..., width) of rows (..., words), in the float type of their scales."""
    if rows.size == 0:
        # which MLX does not reshape
        return mx.zeros((*rows.shape[:-1], form.width), dtype)
    pairs = mx.contiguous(rows[..., form.codes :]).view(dtype)
    pairs = pairs.reshape(*rows.shape[:-1], form.groups, 2)
    return mx.dequantize(rows[..., : form.codes], pairs[..., 0], pairs[..., 1], form.group, form.bits)
