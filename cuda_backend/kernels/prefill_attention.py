# mypy: allow-untyped-defs
"""Attention of a chunk of tokens in Triton (flash attention): keys and values are read once for all queries.

A program takes some tokens of one KV head with all G query heads of it, so that the rows of its tile share
each read, and a tile is as large as registers allow. What is kept is wholly visible, and of the newest tokens
all that stand before the tile; only what stands at its diagonal needs a mask.
:func:`cuda_backend.attention.naive_attend` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..view import ChunkView, LayerView
from .softmax import accumulate, block_size, logits
from .stored import load_stored, stored, strides

# query rows of a tile, what 8 warps have registers for: of usual heads, of wide ones, and in float32
ROWS, ROWS_WIDE, ROWS_FLOAT = 128, 64, 32


@triton.jit
def _newest(
    p_key, p_value, entry, b_inside, key_place, value_place,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Keys and values (N, D) of newest tokens, zeros where not ``b_inside``."""
    r_key, r_value, wide = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE), entry.to(tl.int64)[:, None]
    b_key = tl.load(
        p_key + wide * key_place + r_key, mask=b_inside[:, None] & (r_key < KEY)[None, :], other=0.0
    )
    b_value = tl.load(
        p_value + wide * value_place + r_value,
        mask=b_inside[:, None] & (r_value < VALUE)[None, :],
        other=0.0,
    )
    return b_key, b_value


# what changes from layer to layer, from chunk to chunk, or as the pool grows, is no part of the code
CHANGING = ["slab", "first_head", "length", "tokens", "places", "slots", "listed", "heads"]


@triton.jit(do_not_specialize=CHANGING)
def prefill_attention_fwd_kernel(
    p_query, p_pool_key, p_pool_value, p_key_scales, p_value_scales, p_table, p_offsets, p_key, p_value,
    p_sinks, p_rows, p_out, slab, first_head, length, tokens, places, slots, listed, heads, scale, softcap,
    key_row, key_head, key_place, value_row, value_head, value_place,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    GROUP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS // GROUP tokens of a KV head of a row, token by token, with its query heads side by side.

    Long tiles come first, so that none of them is begun when all others have ended. A slab has ``slots``
    slots, ``listed`` of them in its table, and ``heads`` + 1 offsets; queries have ``places`` for tokens.
    """
    TILE: tl.constexpr = ROWS // GROUP
    head = tl.program_id(1)
    query_row, first = tl.program_id(2).to(tl.int64), 0
    if HAS_ROWS:
        p_rows += tl.program_id(2) * 6
        slab = tl.load(p_rows)
        start = tl.load(p_rows + 1)
        p_key += start * key_place
        p_value += start * value_place
        length = tl.load(p_rows + 2).to(tl.int32)
        tokens = tl.load(p_rows + 3).to(tl.int32)
        first = tl.load(p_rows + 4).to(tl.int32)
        query_row = tl.load(p_rows + 5)
    slab = slab.to(tl.int64)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE
    row = tl.arange(0, ROWS)
    token, member = begin + row // GROUP, row % GROUP
    real = (row < GROUP * TILE) & (token < tokens)
    r_key, r_value, r_entry = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE), tl.arange(0, BLOCK)
    query_head = query_row * tl.num_programs(1) * GROUP + head * GROUP + member
    at = (query_head.to(tl.int64) * places + first + token)[:, None]
    b_query = tl.load(p_query + at * KEY + r_key, mask=real[:, None] & (r_key < KEY)[None, :], other=0.0)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    flat = slab * (heads + 1) + first_head + head
    low, high = tl.load(p_offsets + flat), tl.load(p_offsets + flat + 1)
    # other rows have more tokens than this one
    high = tl.where(begin < tokens, high, low)
    p_table += slab * listed
    for start in range(low, high, BLOCK):
        b_inside = start + r_entry < high
        slot = tl.load(p_table + start + r_entry, mask=b_inside, other=0) + slab * slots
        b_key = load_stored(
            p_pool_key, p_key_scales, slot, b_inside, KEY, KEY_ROW, KEY_BITS, KEY_GROUP, BLOCK_KEY
        )
        b_value = load_stored(
            p_pool_value, p_value_scales, slot, b_inside,
            VALUE, VALUE_ROW, VALUE_BITS, VALUE_GROUP, BLOCK_VALUE,
        )  # fmt: skip
        b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
        b_max, b_sum, b_out = accumulate(b_logit, b_inside[None, :], b_value, b_max, b_sum, b_out)
    p_key += head.to(tl.int64) * key_head
    p_value += head.to(tl.int64) * value_head
    # the tile's first token stands here; whole blocks before it are seen by all its rows
    own = length - tokens + token
    diagonal = (length - tokens + begin + 1) // BLOCK * BLOCK
    last = tl.where(begin < tokens, tl.minimum(length - tokens + begin + TILE, length), 0)
    diagonal = tl.minimum(diagonal, last)
    for start in range(0, diagonal, BLOCK):
        entry = start + r_entry
        b_inside = entry < last
        b_key, b_value = _newest(
            p_key, p_value, entry, b_inside, key_place, value_place, KEY, VALUE, BLOCK_KEY, BLOCK_VALUE
        )
        b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
        b_max, b_sum, b_out = accumulate(b_logit, b_inside[None, :], b_value, b_max, b_sum, b_out)
    for start in range(diagonal, last, BLOCK):
        entry = start + r_entry
        b_inside = entry < last
        b_key, b_value = _newest(
            p_key, p_value, entry, b_inside, key_place, value_place, KEY, VALUE, BLOCK_KEY, BLOCK_VALUE
        )
        b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
        b_seen = entry[None, :] <= own[:, None]
        b_max, b_sum, b_out = accumulate(b_logit, b_seen & b_inside[None, :], b_value, b_max, b_sum, b_out)
    if HAS_SINKS:
        b_null = tl.load(p_sinks + head * GROUP + member).to(tl.float32)
        b_new = tl.maximum(b_max, b_null)
        b_out = b_out * tl.exp(b_max - b_new)[:, None]
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_null - b_new)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    inside = real[:, None] & (r_value < VALUE)[None, :]
    tl.store(p_out + at * VALUE + r_value, b_out.to(p_out.dtype.element_ty), mask=inside)


def prefill_attention(
    queries: torch.Tensor,
    view: LayerView | ChunkView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As :func:`cuda_backend.attention.naive_attend` for a chunk of tokens of one row, or of each of many.

    Of several rows what is padding is zero, and not even read.
    """
    _, query_heads, tokens, key_dim = queries.shape
    heads, value_dim, pool = view.keys.shape[1], view.values.shape[-1], view.pool
    shape, group = (*queries.shape[:3], value_dim), query_heads // heads
    queries, rows = queries.contiguous(), tile_rows(view, group)
    chunks = view.rows if isinstance(view, ChunkView) else None
    out = queries.new_empty(shape) if chunks is None else queries.new_zeros(shape)
    most, count = (tokens, 1) if chunks is None else (chunks.most, len(chunks.numbers))
    prefill_attention_fwd_kernel[(triton.cdiv(most, rows // group), heads, count)](
        queries, **stored(pool, view.keys, view.values), p_table=pool.table, p_offsets=pool.offsets,
        p_key=view.keys, p_value=view.values, p_sinks=sinks, p_out=out,
        p_rows=None if chunks is None else chunks.device,
        slab=view.slab if isinstance(view, LayerView) else 0, first_head=view.layer * heads,
        length=view.keys.shape[2], tokens=tokens, places=tokens, slots=pool.slots, heads=pool.heads,
        listed=pool.table.shape[1], scale=scale, softcap=softcap or 0.0,
        **strides("key", view.keys), **strides("value", view.values),
        GROUP=group, KEY=key_dim, VALUE=value_dim, ROWS=rows, BLOCK=block_size(view),
        BLOCK_KEY=max(16, triton.next_power_of_2(key_dim)),
        BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)),
        HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None, HAS_ROWS=chunks is not None, num_warps=8,
    )  # fmt: skip
    return out


def tile_rows(view: LayerView | ChunkView, group: int) -> int:
    """Query rows of a tile, at least one token's; GPUs before Hopper take fewer."""
    keys, width = view.keys, max(view.keys.shape[-1], view.values.shape[-1])
    small = width > 128 or (keys.is_cuda and torch.cuda.get_device_capability(keys.device)[0] < 9)
    usual = ROWS_FLOAT if keys.element_size() == 4 else ROWS_WIDE if small else ROWS
    return max(usual, triton.next_power_of_2(group))
