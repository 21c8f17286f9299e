# mypy: allow-untyped-defs
"""What both attention kernels do with a block of entries: logits, and a step of an online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from ..view import ChunkView, LayerView


@triton.jit
def logits(b_query, b_key, scale, softcap, HAS_CAP: tl.constexpr):
    """Products of queries (M, D) and keys (N, D) in float32."""
    b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee").to(tl.float32) * scale
    if HAS_CAP:
        b_logit = softcap * (1 - 2 / (tl.exp(2 * b_logit / softcap) + 1))
    return b_logit


@triton.jit
def accumulate(b_logit, b_seen, b_value, b_max, b_sum, b_out):
    """One step of an online softmax: running maximum, sum and output."""
    b_logit = tl.where(b_seen, b_logit, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_logit, 1))
    # a row that has seen nothing yet must not turn -inf - -inf into NaN
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_weight = tl.exp(b_logit - b_base[:, None])
    b_shrink = tl.exp(b_max - b_base)
    b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
    b_part = tl.dot(b_weight.to(b_value.dtype), b_value, input_precision="ieee")
    return b_new, b_sum, b_out * b_shrink[:, None] + b_part


def block_size(view: LayerView | ChunkView) -> int:
    """Entries read at a time: what keeps a program within the shared memory of an A100."""
    width = max(view.keys.shape[-1], view.values.shape[-1]) * view.keys.element_size()
    return 64 if width < 512 else 32
