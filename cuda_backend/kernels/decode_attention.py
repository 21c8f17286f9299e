# mypy: allow-untyped-defs
"""Ragged attention of a decoding step in Triton: the windows, and kept entries through their slab's table.

The kept entries of a layer are split into equal pieces whatever head they belong to, and each head's window
into parts of that size, so that a head of ten times its neighbour's length costs no waiting; each is one
program of a fixed grid, windows first. All query heads of a KV head share one read of its keys and values.
Partial results are merged by their log-sum-exp, many at a time (flash decoding). Rows of a step find their
slabs and the lengths of their windows on the device, and how many pieces there are is no part of the code, so
that nothing is compiled again when a pool grows. :func:`cuda_backend.attention.naive_attend` is the
specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..view import LayerView
from .softmax import accumulate, block_size, logits
from .stored import load_stored, stored, strides

# a piece's partial result must weigh little beside its entries
PIECE_ENTRIES = 128
# numbers of the partial results that a program merges at a time
MERGED, MERGED_WIDTH = 8192, 32


@triton.jit
def _begun(
    p_query, head, tokens,
    GROUP: tl.constexpr, KEY: tl.constexpr, ROWS: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Queries (ROWS, BLOCK_KEY) of a row's KV head, token by token, and an empty partial result."""
    r_query, r_key = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY)
    at = (head * GROUP + r_query % GROUP) * tokens + r_query // GROUP
    mask = (r_query < GROUP * tokens)[:, None] & (r_key < KEY)[None, :]
    b_query = tl.load(p_query + at[:, None] * KEY + r_key, mask=mask, other=0.0)
    b_max, b_sum = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    return b_query, b_max, b_sum, tl.zeros([ROWS, BLOCK_VALUE], tl.float32)


@triton.jit
def _store(p_max, p_sum, p_out, place, real, b_max, b_sum, b_out):
    """Put a partial result into its place, the real rows of it."""
    ROWS: tl.constexpr = b_out.shape[0]
    WIDE: tl.constexpr = b_out.shape[1]
    at = place * ROWS + tl.arange(0, ROWS)
    tl.store(p_max + at, b_max, mask=real)
    tl.store(p_sum + at, b_sum, mask=real)
    tl.store(p_out + at[:, None] * WIDE + tl.arange(0, WIDE), b_out, mask=real[:, None])


# what changes from layer to layer, from step to step, or as the pool grows, is no part of the code
CHANGING = ["slab", "first_head", "length", "slots", "listed", "heads", "tokens", "windows", "window_size",
            "pieces"]  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def decode_attention_fwd_kernel(
    p_query, p_pool_key, p_pool_value, p_key_scales, p_value_scales, p_table, p_offsets, p_key, p_value,
    p_slabs, p_length, p_max, p_sum, p_out,
    slab, first_head, length, slots, listed, heads, tokens, windows, window_size, pieces, scale, softcap,
    key_row, key_head, key_place, value_row, value_head, value_place,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Program h·windows + w takes part w of the window of head h; those behind take pieces of what is kept.

    A slab has ``slots`` slots, ``listed`` of them in its table, and ``heads`` + 1 offsets.

    A part's result goes to its own place, that of piece p for head h to place p + h behind those: along the
    pieces neither p nor h ever falls, so that no two programs share one.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    places = (windows + 1) * KV_HEADS + pieces
    token = tl.arange(0, ROWS) // GROUP
    real = token < tokens
    r_key, r_value, r_entry = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE), tl.arange(0, BLOCK)
    window = row.to(tl.int64)
    if HAS_ROWS:
        slab = tl.load(p_slabs + row)
        length = tl.load(p_length + row).to(tl.int32)
        window = slab.to(tl.int64)
    slab = slab.to(tl.int64)
    if part < windows * KV_HEADS:
        head = part // windows
        low = part % windows * window_size
        high = tl.minimum(low + window_size, length)
        if low < high:
            p_key += window * key_row + head.to(tl.int64) * key_head
            p_value += window * value_row + head.to(tl.int64) * value_head
            b_query, b_max, b_sum, b_out = _begun(
                p_query, row * KV_HEADS + head, tokens, GROUP, KEY, ROWS, BLOCK_KEY, BLOCK_VALUE
            )
            own = length - tokens + token
            for start in range(low, high, BLOCK):
                entry = start + r_entry
                b_inside = entry < high
                wide = entry.to(tl.int64)[:, None]
                b_key = tl.load(
                    p_key + wide * key_place + r_key,
                    mask=b_inside[:, None] & (r_key < KEY)[None, :],
                    other=0.0,
                )
                b_value = tl.load(
                    p_value + wide * value_place + r_value,
                    mask=b_inside[:, None] & (r_value < VALUE)[None, :],
                    other=0.0,
                )
                b_seen = (entry[None, :] <= own[:, None]) & b_inside[None, :] & real[:, None]
                b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
                b_max, b_sum, b_out = accumulate(b_logit, b_seen, b_value, b_max, b_sum, b_out)
            _store(p_max, p_sum, p_out, row.to(tl.int64) * places + part, real, b_max, b_sum, b_out)
    else:
        piece = part - windows * KV_HEADS
        base = slab * (heads + 1) + first_head
        p_table += slab * listed
        first = tl.load(p_offsets + base)
        total = tl.load(p_offsets + base + KV_HEADS) - first
        size = (total + pieces - 1) // pieces
        begin = first + piece * size
        end = tl.minimum(begin + size, first + total)
        for head in range(KV_HEADS):
            low = tl.maximum(begin, tl.load(p_offsets + base + head))
            high = tl.minimum(end, tl.load(p_offsets + base + head + 1))
            if low < high:
                b_query, b_max, b_sum, b_out = _begun(
                    p_query, row * KV_HEADS + head, tokens, GROUP, KEY, ROWS, BLOCK_KEY, BLOCK_VALUE
                )
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
                    b_seen = b_inside[None, :] & real[:, None]
                    b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
                    b_max, b_sum, b_out = accumulate(b_logit, b_seen, b_value, b_max, b_sum, b_out)
                place = row.to(tl.int64) * places + part + head
                _store(p_max, p_sum, p_out, place, real, b_max, b_sum, b_out)


@triton.jit(do_not_specialize=[name for name in CHANGING if name not in ("slots", "listed")])
def decode_attention_merge_kernel(
    p_max, p_sum, p_part, p_offsets, p_slabs, p_length, p_sinks, p_out,
    slab, first_head, length, heads, tokens, windows, window_size, pieces,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one row and KV head, WIDTH columns of them, BLOCK at a time."""
    row, head = tl.program_id(0), tl.program_id(1)
    places = (windows + 1) * KV_HEADS + pieces
    r_query, r_part = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    r_value = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    token, member = r_query // GROUP, r_query % GROUP
    real = r_query < GROUP * tokens
    if HAS_ROWS:
        slab = tl.load(p_slabs + row)
        length = tl.load(p_length + row).to(tl.int32)
    base = slab.to(tl.int64) * (heads + 1) + first_head
    first = tl.load(p_offsets + base)
    size = tl.maximum((tl.load(p_offsets + base + KV_HEADS) - first + pieces - 1) // pieces, 1)
    low = tl.load(p_offsets + base + head) - first
    high = tl.load(p_offsets + base + head + 1) - first
    # the parts of the window that hold tokens, then the pieces that hold entries of this head
    recent = (length + window_size - 1) // window_size
    piece = low // size
    count = recent + tl.where(low < high, (high - 1) // size + 1 - piece, 0)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, count, BLOCK):
        which = start + r_part
        place = tl.where(which < recent, head * windows, windows * KV_HEADS + head + piece - recent) + which
        at = ((row.to(tl.int64) * places + place) * ROWS)[:, None] + r_query[None, :]
        here = (which < count)[:, None] & real[None, :]
        b_top = tl.load(p_max + at, mask=here, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_top, 0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight, b_shrink = tl.exp(b_top - b_base[None, :]), tl.exp(b_max - b_base)
        b_sum = b_sum * b_shrink + tl.sum(tl.load(p_sum + at, mask=here, other=0.0) * b_weight, 0)
        b_part = tl.load(p_part + at[:, :, None] * BLOCK_VALUE + r_value, mask=here[:, :, None], other=0.0)
        b_out = b_out * b_shrink[:, None] + tl.sum(b_part * b_weight[:, :, None], 0)
        b_max = b_new
    if HAS_SINKS:
        b_null = tl.load(p_sinks + head * GROUP + member, mask=real, other=0.0).to(tl.float32)
        b_new = tl.maximum(b_max, b_null)
        b_out = b_out * tl.exp(b_max - b_new)[:, None]
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_null - b_new)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    at = ((row * KV_HEADS + head) * GROUP + member) * tokens + token
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
    heads, value_dim, pool = view.kv_heads, view.values.shape[-1], view.pool
    group, queries = query_heads // heads, queries.contiguous()
    height = max(16, triton.next_power_of_2(group * tokens))
    wide = max(16, triton.next_power_of_2(value_dim))
    pieces = pieces or piece_count(view)
    # of the room, for rows tell how much of it is in use on the device only
    part = max(PIECE_ENTRIES, triton.cdiv(pool.capacity * heads, pieces))
    windows = triton.cdiv(view.keys.shape[2], part)
    places = (windows + 1) * heads + pieces
    top = queries.new_empty(rows, places, height, dtype=torch.float32)
    total, parts = torch.empty_like(top), top.new_empty(*top.shape, wide)
    out = queries.new_empty(*queries.shape[:3], value_dim)
    slabs, after = (view.rows.slabs, view.rows.after) if view.rows is not None else (None, None)
    split = {"heads": pool.heads, "tokens": tokens, "windows": windows, "window_size": part, "pieces": pieces}
    shapes = {"KV_HEADS": heads, "GROUP": group, "VALUE": value_dim, "ROWS": height, "BLOCK_VALUE": wide}
    # what is unpacked stands in registers, of which this leaves enough
    packed = pool.forms[0] is not None
    own = {"slab": view.slab, "first_head": view.first, "length": view.keys.shape[2]}
    decode_attention_fwd_kernel[(rows, windows * heads + pieces)](
        queries, **stored(pool, view.keys, view.values), p_table=pool.table, p_offsets=pool.offsets,
        p_key=view.keys, p_value=view.values, p_slabs=slabs, p_length=after,
        p_max=top, p_sum=total, p_out=parts, **own, slots=pool.slots, listed=pool.table.shape[1],
        **split, scale=scale, softcap=softcap or 0.0,
        **strides("key", view.keys), **strides("value", view.values),
        **shapes, KEY=key_dim, BLOCK=32 if packed else block_size(view),
        BLOCK_KEY=max(16, triton.next_power_of_2(key_dim)),
        HAS_CAP=softcap is not None, HAS_ROWS=slabs is not None, num_warps=4 if packed and height < 64 else 8,
    )  # fmt: skip
    width = min(MERGED_WIDTH, wide)
    decode_attention_merge_kernel[(rows, heads, wide // width)](
        top, total, parts, pool.offsets, slabs, after, sinks, out, **own, **split,
        **shapes, WIDTH=width, BLOCK=max(1, MERGED // (height * width)),
        HAS_SINKS=sinks is not None, HAS_ROWS=slabs is not None,
    )  # fmt: skip
    return out


def piece_count(view: LayerView) -> int:
    """How many programs share a layer's kept entries: host arithmetic, the same for every step."""
    processors = 8
    if view.keys.is_cuda:
        processors = torch.cuda.get_device_properties(view.keys.device).multi_processor_count
    entries = view.pool.capacity * view.kv_heads
    return max(1, min(triton.cdiv(entries, PIECE_ENTRIES), triton.cdiv(2 * processors, view.count)))
