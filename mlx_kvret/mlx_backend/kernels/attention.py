"""Which kernel serves which attention call; the twin is :func:`..attention.attend_reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .decode_attention import MAX_TOKENS, decode_attention, fits
from .prefill_attention import prefill_attention

if TYPE_CHECKING:
    from ..view import LayerView


def attend(
    queries: mx.array,
    view: LayerView,
    scale: float,
    causal: bool = True,
    sinks: mx.array | None = None,
) -> mx.array:
    """As :func:`..attention.attend`."""
    _, query_heads, tokens, key_dim = queries.shape
    rows = query_heads // view.kv_heads * tokens
    if tokens <= MAX_TOKENS and fits(rows, key_dim, view.values.shape[3]):
        return decode_attention(queries, view, scale, causal, sinks)
    # each row has its own lengths, which come to the host once for a whole chunk
    single = [
        prefill_attention(queries[row : row + 1], one, scale, causal, sinks)
        for row, one in enumerate(view.rows())
    ]
    return single[0] if len(single) == 1 else mx.concatenate(single)
