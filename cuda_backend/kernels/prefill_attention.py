# mypy: allow-untyped-defs
"""Attention of a chunk of tokens in Triton: one program per query head and block of tokens (flash attention).

:func:`cuda_backend.attention.naive_attend` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..view import LayerView
from .softmax import accumulate, block_size, logits
from .stored import load_stored, stored, strides


@triton.jit(do_not_specialize=["first_head", "length", "tokens"])
def prefill_attention_fwd_kernel(
    p_query, p_pool_key, p_pool_value, p_key_scales, p_value_scales, p_table, p_offsets, p_key, p_value,
    p_sinks, p_out, first_head, length, tokens, scale, softcap,
    key_row, key_head, key_place, value_row, value_head, value_place,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """A block of one query head's tokens: ragged kept entries, then the newest up to its diagonal."""
    query_head = tl.program_id(1)
    head = query_head // GROUP
    r_key, r_value, r_entry = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE), tl.arange(0, BLOCK)
    token = tl.program_id(0) * BLOCK + r_entry
    real = token < tokens
    own = length - tokens + token
    at = (tl.program_id(1).to(tl.int64) * tokens + token)[:, None]
    b_query = tl.load(p_query + at * KEY + r_key, mask=real[:, None] & (r_key < KEY)[None, :], other=0.0)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_out = tl.zeros([BLOCK, BLOCK_VALUE], tl.float32)
    flat = first_head + head
    low, high = tl.load(p_offsets + flat), tl.load(p_offsets + flat + 1)
    for start in range(low, high, BLOCK):
        b_inside = start + r_entry < high
        slot = tl.load(p_table + start + r_entry, mask=b_inside, other=0).to(tl.int64)
        b_key = load_stored(
            p_pool_key, p_key_scales, slot, b_inside, KEY, KEY_ROW, KEY_BITS, KEY_GROUP, BLOCK_KEY
        )
        b_value = load_stored(
            p_pool_value, p_value_scales, slot, b_inside,
            VALUE, VALUE_ROW, VALUE_BITS, VALUE_GROUP, BLOCK_VALUE,
        )  # fmt: skip
        b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
        b_seen = b_inside[None, :] & real[:, None]
        b_max, b_sum, b_out = accumulate(b_logit, b_seen, b_value, b_max, b_sum, b_out)
    last = tl.minimum(length - tokens + (tl.program_id(0) + 1) * BLOCK, length)
    for start in range(0, last, BLOCK):
        entry = start + r_entry
        b_inside = entry < last
        wide = entry.to(tl.int64)[:, None]
        b_key = tl.load(
            p_key + head * key_head + wide * key_place + r_key,
            mask=b_inside[:, None] & (r_key < KEY)[None, :],
            other=0.0,
        )
        b_value = tl.load(
            p_value + head * value_head + wide * value_place + r_value,
            mask=b_inside[:, None] & (r_value < VALUE)[None, :],
            other=0.0,
        )
        b_logit = logits(b_query, b_key, scale, softcap, HAS_CAP)
        b_seen = (entry[None, :] <= own[:, None]) & real[:, None]
        b_max, b_sum, b_out = accumulate(b_logit, b_seen, b_value, b_max, b_sum, b_out)
    if HAS_SINKS:
        b_null = tl.load(p_sinks + query_head).to(tl.float32)
        b_new = tl.maximum(b_max, b_null)
        b_out = b_out * tl.exp(b_max - b_new)[:, None]
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_null - b_new)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    inside = real[:, None] & (r_value < VALUE)[None, :]
    tl.store(p_out + at * VALUE + r_value, b_out.to(p_out.dtype.element_ty), mask=inside)


def prefill_attention(
    queries: torch.Tensor,
    view: LayerView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As :func:`cuda_backend.attention.naive_attend` for a chunk of tokens of one row."""
    _, query_heads, tokens, key_dim = queries.shape
    heads, value_dim = view.kv_heads, view.values.shape[-1]
    queries, out = queries.contiguous(), queries.new_empty(*queries.shape[:3], value_dim)
    slab, block = view.pool.slab(view.slab), block_size(view)
    prefill_attention_fwd_kernel[(triton.cdiv(tokens, block), query_heads)](
        queries, **stored(slab, view.keys, view.values), p_table=slab.table, p_offsets=slab.offsets,
        p_key=view.keys, p_value=view.values, p_sinks=sinks, p_out=out, first_head=view.first,
        length=view.keys.shape[2], tokens=tokens, scale=scale, softcap=softcap or 0.0,
        **strides("key", view.keys), **strides("value", view.values),
        KV_HEADS=heads, GROUP=query_heads // heads, KEY=key_dim, VALUE=value_dim, BLOCK=block,
        BLOCK_KEY=max(16, triton.next_power_of_2(key_dim)),
        BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)),
        HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None, num_warps=8,
    )  # fmt: skip
    return out
