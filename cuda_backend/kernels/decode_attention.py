# mypy: allow-untyped-defs
"""Ragged attention of a decoding step in Triton: kept entries through a slab's table, then the window.

The entries of a layer are split into equal pieces whatever head they belong to, so that a head of ten times
its neighbour's length costs no waiting; each piece is one program of a fixed grid. All query heads of a KV
head share one read of its keys and values. Partial results are merged by their log-sum-exp (flash decoding).
Rows of a step find their slabs and the lengths of their windows on the device.
:func:`cuda_backend.attention.naive_attend` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..view import LayerView
from .softmax import accumulate, block_size, logits

# a piece's partial result must weigh little beside its entries
PIECE_ENTRIES = 128


@triton.jit(do_not_specialize=["slab", "first_head", "length"])
def decode_attention_fwd_kernel(
    p_query, p_pool_key, p_pool_value, p_table, p_offsets, p_key, p_value, p_slabs, p_length,
    p_max, p_sum, p_out,
    slab, first_head, length, slots, listed, heads, scale, softcap,
    key_row, key_head, key_place, value_row, value_head, value_place,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Program p < PIECES takes a piece of the kept entries, program PIECES + h the window of head h.

    A slab has ``slots`` slots, ``listed`` of them in its table, and ``heads`` + 1 offsets.

    Partial results go to place p + h of PIECES + 2·KV_HEADS: along the pieces neither p nor h ever falls, so
    that no two programs share a place; windows follow behind.
    """
    row, piece = tl.program_id(0), tl.program_id(1)
    places: tl.constexpr = PIECES + 2 * KV_HEADS
    # query rows of a KV head: token by token, its query heads side by side
    r_query = tl.arange(0, ROWS)
    token, member = r_query // GROUP, r_query % GROUP
    real = r_query < GROUP * TOKENS
    r_key, r_value, r_entry = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE), tl.arange(0, BLOCK)
    window = row
    if HAS_ROWS:
        slab = tl.load(p_slabs + row)
        length = tl.load(p_length + row).to(tl.int32)
        window = slab
    slab = slab.to(tl.int64)
    base = slab * (heads + 1) + first_head
    p_table += slab * listed
    p_pool_key += slab * slots * KEY
    p_pool_value += slab * slots * VALUE
    p_key += window * key_row
    p_value += window * value_row
    first = tl.load(p_offsets + base)
    total = tl.load(p_offsets + base + KV_HEADS) - first
    size = (total + PIECES - 1) // PIECES
    begin = first + piece * size
    end = tl.minimum(begin + size, first + total)
    for head in range(KV_HEADS):
        if piece < PIECES:
            low = tl.maximum(begin, tl.load(p_offsets + base + head))
            high = tl.minimum(end, tl.load(p_offsets + base + head + 1))
            place = piece + head
        else:
            low = 0
            high = tl.where(piece - PIECES == head, length, 0)
            place = PIECES + KV_HEADS + head
        if low < high:
            b_max = tl.full([ROWS], float("-inf"), tl.float32)
            b_sum = tl.zeros([ROWS], tl.float32)
            b_out = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
            at = ((row * KV_HEADS + head) * GROUP + member) * TOKENS + token
            b_query = tl.load(
                p_query + at[:, None] * KEY + r_key[None, :],
                mask=real[:, None] & (r_key < KEY)[None, :],
                other=0.0,
            )
            for start in range(low, high, BLOCK):
                entry = start + r_entry
                b_inside = entry < high
                if piece < PIECES:
                    slot = tl.load(p_table + entry, mask=b_inside, other=0).to(tl.int64)
                    p_k = p_pool_key + slot[:, None] * KEY
                    p_v = p_pool_value + slot[:, None] * VALUE
                    b_seen = b_inside[None, :] & real[:, None]
                else:
                    wide = entry.to(tl.int64)[:, None]
                    p_k = p_key + head * key_head + wide * key_place
                    p_v = p_value + head * value_head + wide * value_place
                    own = length - TOKENS + token
                    b_seen = (entry[None, :] <= own[:, None]) & b_inside[None, :] & real[:, None]
                b_key = tl.load(p_k + r_key, mask=b_inside[:, None] & (r_key < KEY)[None, :], other=0.0)
                b_value = tl.load(
                    p_v + r_value, mask=b_inside[:, None] & (r_value < VALUE)[None, :], other=0.0
                )
                b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
                b_max, b_sum, b_out = accumulate(b_logit, b_seen, b_value, b_max, b_sum, b_out)
            part = (row * places + place) * ROWS + r_query
            tl.store(p_max + part, b_max, mask=real)
            tl.store(p_sum + part, b_sum, mask=real)
            tl.store(p_out + part[:, None] * BLOCK_VALUE + r_value, b_out, mask=real[:, None])


@triton.jit(do_not_specialize=["slab", "first_head"])
def decode_attention_merge_kernel(
    p_max, p_sum, p_part, p_offsets, p_slabs, p_sinks, p_out, slab, first_head, heads,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, VALUE: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, BLOCK_VALUE: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one sequence and KV head by their log-sum-exp."""
    row, head = tl.program_id(0), tl.program_id(1)
    places: tl.constexpr = PIECES + 2 * KV_HEADS
    r_query, r_value = tl.arange(0, ROWS), tl.arange(0, BLOCK_VALUE)
    token, member = r_query // GROUP, r_query % GROUP
    real = r_query < GROUP * TOKENS
    if HAS_ROWS:
        slab = tl.load(p_slabs + row)
    base = slab.to(tl.int64) * (heads + 1) + first_head
    first = tl.load(p_offsets + base)
    size = (tl.load(p_offsets + base + KV_HEADS) - first + PIECES - 1) // PIECES
    low = tl.load(p_offsets + base + head) - first
    high = tl.load(p_offsets + base + head + 1) - first
    # the pieces that hold entries of this head, then the window, which always holds the step's own tokens
    piece = tl.where(low < high, low // tl.maximum(size, 1), 0)
    stop = tl.where(low < high, (high - 1) // tl.maximum(size, 1) + 1, 0)
    part = (row * places + PIECES + KV_HEADS + head) * ROWS + r_query
    b_max = tl.load(p_max + part, mask=real, other=0.0)
    b_sum = tl.load(p_sum + part, mask=real, other=1.0)
    b_out = tl.load(p_part + part[:, None] * BLOCK_VALUE + r_value, mask=real[:, None], other=0.0)
    for p in range(piece, stop):
        part = (row * places + p + head) * ROWS + r_query
        b_other = tl.load(p_max + part, mask=real, other=0.0)
        b_new = tl.maximum(b_max, b_other)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_left, b_right = tl.exp(b_max - b_base), tl.exp(b_other - b_base)
        b_sum = b_sum * b_left + tl.load(p_sum + part, mask=real, other=0.0) * b_right
        b_part = tl.load(p_part + part[:, None] * BLOCK_VALUE + r_value, mask=real[:, None], other=0.0)
        b_out = b_out * b_left[:, None] + b_part * b_right[:, None]
        b_max = b_new
    if HAS_SINKS:
        b_null = tl.load(p_sinks + head * GROUP + member, mask=real, other=0.0).to(tl.float32)
        b_new = tl.maximum(b_max, b_null)
        b_out = b_out * tl.exp(b_max - b_new)[:, None]
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_null - b_new)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    at = ((row * KV_HEADS + head) * GROUP + member) * TOKENS + token
    inside = real[:, None] & (r_value < VALUE)[None, :]
    tl.store(p_out + at[:, None] * VALUE + r_value, b_out.to(p_out.dtype.element_ty), mask=inside)


def decode_attention(
    queries: torch.Tensor,
    view: LayerView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    pieces: int | None = None,
) -> torch.Tensor:
    """As :func:`cuda_backend.attention.naive_attend` for a few query tokens; nothing waits for the device.

    Args:
        pieces: programs over a row's kept entries of the layer; by default two waves of the GPU in all, or
            fewer where there is little to read.
    """
    rows, query_heads, tokens, key_dim = queries.shape
    heads, value_dim = view.kv_heads, view.values.shape[-1]
    group, queries = query_heads // heads, queries.contiguous()
    height = max(16, triton.next_power_of_2(group * tokens))
    wide = max(16, triton.next_power_of_2(value_dim))
    if pieces is None:
        pieces = piece_count(view)
    places = pieces + 2 * heads
    top = queries.new_empty(rows, places, height, dtype=torch.float32)
    total, part = torch.empty_like(top), top.new_empty(*top.shape, wide)
    out = queries.new_empty(*queries.shape[:3], value_dim)
    pool, shapes = view.pool, {"KV_HEADS": heads, "GROUP": group, "TOKENS": tokens}
    many = view.rows is not None
    slabs, after = (view.rows.slabs, view.rows.after) if view.rows is not None else (None, None)
    decode_attention_fwd_kernel[(rows, pieces + heads)](
        queries, pool.keys, pool.values, pool.table, pool.offsets, view.keys, view.values,
        slabs, after, top, total, part,
        view.slab, view.first, view.keys.shape[2], pool.slots, pool.table.shape[1], pool.heads,
        scale, softcap or 0.0, *view.keys.stride()[:3], *view.values.stride()[:3],
        **shapes, KEY=key_dim, VALUE=value_dim, PIECES=pieces, ROWS=height, BLOCK=block_size(view),
        BLOCK_KEY=max(16, triton.next_power_of_2(key_dim)), BLOCK_VALUE=wide,
        HAS_CAP=softcap is not None, HAS_ROWS=many,
    )  # fmt: skip
    decode_attention_merge_kernel[(rows, heads)](
        top, total, part, pool.offsets, slabs, sinks, out, view.slab, view.first, pool.heads,
        **shapes, VALUE=value_dim, PIECES=pieces, ROWS=height, BLOCK_VALUE=wide,
        HAS_SINKS=sinks is not None, HAS_ROWS=many,
    )  # fmt: skip
    return out


def piece_count(view: LayerView) -> int:
    """How many programs share a layer's kept entries: host arithmetic, the same for every step."""
    processors = 8
    if view.keys.is_cuda:
        processors = torch.cuda.get_device_properties(view.keys.device).multi_processor_count
    entries = view.pool.capacity * view.kv_heads
    return max(1, min(triton.cdiv(entries, PIECE_ENTRIES), triton.cdiv(2 * processors, view.count)))
