# mypy: allow-untyped-defs
"""Kept entries as Triton kernels read and write them: in the model's float type, or packed in few bits.

A packed row is codes, lowest bits first, then scale and bias of each group (:mod:`mlx_kvret.core.bits`). It
is read as bytes and, for the scales, in the float type; only a tile in registers is ever unpacked.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mlx_kvret.core.bits import Packing

from .. import packing
from ..pool import Pool

LEAST = tl.constexpr(packing.LEAST)


@triton.jit
def load_stored(
    p_rows, p_scales, slot, b_inside,
    WIDTH: tl.constexpr, ROW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys or values (N, BLOCK) of slots (N,), zeros where ``b_inside`` (N,) is False or beyond WIDTH.

    A row is ROW elements of ``p_rows``.
    """
    if BITS == 16:
        column = tl.arange(0, BLOCK)[None, :]
        inside = b_inside[:, None] & (column < WIDTH)
        return tl.load(p_rows + slot[:, None] * ROW + column, mask=inside, other=0.0)
    else:
        codes: tl.constexpr = WIDTH * BITS // 8
        item: tl.constexpr = p_scales.dtype.element_ty.primitive_bitwidth // 8
        column = tl.arange(0, BLOCK * BITS // 8)[None, :]
        inside = b_inside[:, None] & (column < codes)
        b_code = tl.load(p_rows + slot[:, None] * ROW + column, mask=inside, other=0)
        if BITS == 4:
            b_code = tl.interleave(b_code & 15, b_code >> 4)
        group = tl.arange(0, BLOCK // GROUP)[None, :]
        inside = b_inside[:, None] & (group < WIDTH // GROUP)
        p_pair = p_scales + slot[:, None] * (ROW // item) + codes // item + 2 * group
        b_scale = tl.load(p_pair, mask=inside, other=0.0).to(tl.float32)[:, :, None]
        b_bias = tl.load(p_pair + 1, mask=inside, other=0.0).to(tl.float32)[:, :, None]
        b_code = tl.reshape(b_code, [slot.shape[0], BLOCK // GROUP, GROUP]).to(tl.float32)
        b_real = (b_code * b_scale + b_bias).to(p_scales.dtype.element_ty)
        return tl.reshape(b_real, [slot.shape[0], BLOCK])


@triton.jit
def store_stored(
    p_rows, p_scales, slot, b_here, b_real,
    WIDTH: tl.constexpr, ROW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write keys or values (N, BLOCK) into slots (N,) where ``b_here`` (N,), with the very bits of core."""
    if BITS == 16:
        column = tl.arange(0, BLOCK)[None, :]
        tl.store(p_rows + slot[:, None] * ROW + column, b_real, mask=b_here[:, None] & (column < WIDTH))
    else:
        codes: tl.constexpr = WIDTH * BITS // 8
        item: tl.constexpr = p_scales.dtype.element_ty.primitive_bitwidth // 8
        most: tl.constexpr = 2**BITS - 1
        b_real = tl.reshape(b_real.to(tl.float32), [slot.shape[0], BLOCK // GROUP, GROUP])
        b_low, b_high = tl.min(b_real, 2), tl.max(b_real, 2)
        # the edge that is farther from 0 is met exactly, and so is 0
        b_below = tl.abs(b_low) > tl.abs(b_high)
        b_step = tl.maximum(tl.div_rn(b_high - b_low, tl.full(b_low.shape, most, tl.float32)), LEAST)
        b_step = tl.where(b_below, b_step, -b_step)
        b_edge = tl.where(b_below, b_low, b_high)
        b_steps = _rounded(tl.div_rn(b_edge, b_step))
        b_zero = b_steps == 0
        b_scale = tl.where(b_zero, b_step, tl.div_rn(b_edge, tl.where(b_zero, 1.0, b_steps)))
        b_bias = tl.where(b_zero, 0.0, b_edge)
        b_wide = tl.broadcast_to(b_scale[:, :, None], b_real.shape)
        b_code = _rounded(tl.div_rn(b_real - b_bias[:, :, None], b_wide))
        b_code = tl.minimum(tl.maximum(b_code, 0.0), most).to(tl.int32)
        if BITS == 4:
            b_even, b_odd = tl.split(tl.reshape(b_code, [slot.shape[0], BLOCK // 2, 2]))
            b_code = b_even | (b_odd << 4)
        b_code = tl.reshape(b_code, [slot.shape[0], BLOCK * BITS // 8]).to(tl.uint8)
        column = tl.arange(0, BLOCK * BITS // 8)[None, :]
        tl.store(p_rows + slot[:, None] * ROW + column, b_code, mask=b_here[:, None] & (column < codes))
        group = tl.arange(0, BLOCK // GROUP)[None, :]
        inside = b_here[:, None] & (group < WIDTH // GROUP)
        p_pair = p_scales + slot[:, None] * (ROW // item) + codes // item + 2 * group
        tl.store(p_pair, b_scale.to(p_scales.dtype.element_ty), mask=inside)
        tl.store(p_pair + 1, b_bias.to(p_scales.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(b_x):
    """To the nearest whole number, ties to even, by adding what leaves no room for a fraction."""
    wide: tl.constexpr = 8388608.0
    b_size = tl.abs(b_x)
    b_whole = tl.where(b_size < wide, (b_size + wide) - wide, b_size)
    return tl.where(b_x < 0, -b_whole, b_whole)


def stored(pool: Pool, keys: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    """What kernels need to know of a pool's rows; keys and values (..., D) of the newest tokens."""
    pairs = zip(("key", "value"), (pool.keys, pool.values), pool.forms, (keys, values), strict=True)
    return {name: value for pair in pairs for name, value in _stored(*pair).items()}


def _stored(name: str, rows: torch.Tensor, form: Packing | None, like: torch.Tensor) -> dict[str, Any]:
    # of an empty pool the types are not known yet
    real, wide = rows.view(like.dtype), name.upper()
    if form is None:
        made: dict[str, Any] = {
            f"p_pool_{name}": real,
            f"p_{name}_scales": None,
            f"{wide}_ROW": like.shape[-1],
        }
        return made | {f"{wide}_BITS": 16, f"{wide}_GROUP": 1}
    made = {f"p_pool_{name}": rows.view(torch.uint8), f"p_{name}_scales": real}
    made |= {f"{wide}_ROW": 4 * form.words(like.element_size())}
    return made | {f"{wide}_BITS": form.bits, f"{wide}_GROUP": form.group}


def strides(name: str, window: torch.Tensor) -> dict[str, int]:
    """Steps within a window (R, H, T, D) from row to row, head to head and token to token."""
    return {
        f"{name}_{axis}": step for axis, step in zip(("row", "head", "place"), window.stride(), strict=False)
    }
