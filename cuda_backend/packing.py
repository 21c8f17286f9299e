"""Kept keys and values in few bits, in plain torch: the words that :mod:`mlx_kvret.core.bits` specifies."""

from __future__ import annotations

import torch

from mlx_kvret.core.bits import Packing

# of a scale
LEAST = 1e-7


def pack(vectors: torch.Tensor, form: Packing) -> torch.Tensor:
    """Vectors (..., width) as rows of words (..., words) int32; scales and biases have their float type."""
    x = vectors.float().unflatten(-1, (form.groups, form.group))
    low, high, most = x.amin(-1, True), x.amax(-1, True), float(2**form.bits - 1)
    # the edge that is farther from 0 is met exactly, and so is 0
    below = low.abs() > high.abs()
    step = ((high - low) / most).clamp(min=LEAST)
    step, edge = torch.where(below, step, -step), torch.where(below, low, high)
    steps = (edge / step).round()
    at_zero = steps == 0
    scale = torch.where(at_zero, step, edge / torch.where(at_zero, 1, steps))
    bias = torch.where(at_zero, 0, edge)
    codes = ((x - bias) / scale).round().clamp(0, most).to(torch.uint8).flatten(-2)
    if form.bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    pairs = torch.cat([scale, bias], -1).to(vectors.dtype).flatten(-2)
    return torch.cat([codes, pairs.view(torch.uint8)], -1).view(torch.int32)


def unpack(rows: torch.Tensor, form: Packing, dtype: torch.dtype) -> torch.Tensor:
    """Rows of words (..., words) as vectors (..., width) of ``dtype``, that of their scales too."""
    codes = rows[..., : form.codes].contiguous().view(torch.uint8)
    if form.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    pairs = rows[..., form.codes :].contiguous().view(dtype).unflatten(-1, (form.groups, 2)).float()
    # each operation rounds to the type, as MLX's do
    product = (codes.float().unflatten(-1, (form.groups, form.group)) * pairs[..., :1]).to(dtype)
    return (product.float() + pairs[..., 1:]).to(dtype).flatten(-2)
