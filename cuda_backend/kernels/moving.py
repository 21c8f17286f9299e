# mypy: allow-untyped-defs
"""Moving entries in Triton: new tokens into windows, and survivors into the pool's holes.

A program moves a tile of many entries, so that each of its threads moves 16 bytes at a time. Survivors are
packed on their way, where the pool is. The plain twins of both are in :mod:`.dispatch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pool import Pool
from .stored import store_stored, stored, strides

# elements of a tile: eight for each of 128 threads
TILE = 1024


@triton.jit(do_not_specialize=["count"])
def append_kernel(
    p_key, p_value, p_slabs, p_places, p_window_key, p_window_value, count,
    key_row, key_head, value_row, value_head, window_row, window_head, window_place, wide_row, wide_head,
    wide_place,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the new token of ENTRIES heads, of ``count`` = R·H, behind what their rows' windows hold."""
    which = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    column = tl.arange(0, BLOCK)[None, :]
    row, head = which // HEADS, which % HEADS
    slab = tl.load(p_slabs + row, mask=which < count, other=0).to(tl.int64)
    place = tl.load(p_places + row, mask=which < count, other=0).to(tl.int64)
    here = (which < count)[:, None] & (column < KEY)
    b_key = tl.load(p_key + (row * key_row + head * key_head)[:, None] + column, mask=here)
    at = (slab * window_row + head * window_head + place * window_place)[:, None] + column
    tl.store(p_window_key + at, b_key, mask=here)
    here = (which < count)[:, None] & (column < VALUE)
    b_value = tl.load(p_value + (row * value_row + head * value_head)[:, None] + column, mask=here)
    at = (slab * wide_row + head * wide_head + place * wide_place)[:, None] + column
    tl.store(p_window_value + at, b_value, mask=here)


@triton.jit(do_not_specialize=["count", "tokens", "heads"])
def fill_kernel(
    p_key, p_value, p_slots, p_keep, p_pool_key, p_pool_value, p_key_scales, p_value_scales,
    count, tokens, heads, key_row, key_head, key_place, value_row, value_head, value_place,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move ENTRIES of ``count`` newcomers into their slots; those that do not survive are not even read."""
    which = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    column = tl.arange(0, BLOCK)[None, :]
    token, head, row = which % tokens, which // tokens % heads, which // tokens // heads
    b_keep = tl.load(p_keep + which, mask=which < count, other=0) != 0
    slot = tl.load(p_slots + which, mask=b_keep, other=0).to(tl.int64)
    at = (row * key_row + head * key_head + token * key_place)[:, None] + column
    b_key = tl.load(p_key + at, mask=b_keep[:, None] & (column < KEY), other=0.0)
    store_stored(p_pool_key, p_key_scales, slot, b_keep, b_key, KEY, KEY_ROW, KEY_BITS, KEY_GROUP, BLOCK)
    at = (row * value_row + head * value_head + token * value_place)[:, None] + column
    b_value = tl.load(p_value + at, mask=b_keep[:, None] & (column < VALUE), other=0.0)
    store_stored(
        p_pool_value, p_value_scales, slot, b_keep, b_value, VALUE, VALUE_ROW, VALUE_BITS, VALUE_GROUP, BLOCK
    )


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    slabs: torch.Tensor,
    places: torch.Tensor,
    window_keys: torch.Tensor,
    window_values: torch.Tensor,
) -> None:
    """As :func:`.dispatch.append`."""
    rows, heads, _, key_dim = keys.shape
    value_dim = values.shape[-1]
    block = triton.next_power_of_2(max(key_dim, value_dim))
    entries = max(1, TILE // block)
    # the last dimension of all of them is contiguous
    keys, values = (a if a.stride(3) == 1 else a.contiguous() for a in (keys, values))
    append_kernel[(triton.cdiv(rows * heads, entries),)](
        keys, values, slabs, places, window_keys, window_values, rows * heads,
        *keys.stride()[:2], *values.stride()[:2], *window_keys.stride()[:3], *window_values.stride()[:3],
        HEADS=heads, KEY=key_dim, VALUE=value_dim, ENTRIES=entries, BLOCK=block,
    )  # fmt: skip


def fill(
    pool: Pool, slots: torch.Tensor, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """As :func:`.dispatch.fill`."""
    _, heads, tokens, key_dim = keys.shape
    value_dim = values.shape[-1]
    block = triton.next_power_of_2(max(key_dim, value_dim))
    entries = max(1, TILE // block)
    keys, values = (a if a.stride(3) == 1 else a.contiguous() for a in (keys, values))
    fill_kernel[(triton.cdiv(len(slots), entries),)](
        keys, values, slots, keep, **stored(pool, keys, values),
        count=len(slots), tokens=tokens, heads=heads, **strides("key", keys), **strides("value", values),
        KEY=key_dim, VALUE=value_dim, ENTRIES=entries, BLOCK=block,
    )  # fmt: skip
