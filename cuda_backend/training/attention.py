"""Attention in which every entry decays with its age: logits of query t and key i get ``(t - i)·log β_i``.

The bias has rank 2: ``(t - c)·log β_i + (c - i)·log β_i`` for any c. So two more columns of queries and keys
carry it, and stock fused attention computes outputs and gradients without a T×T bias. Queries are taken in
blocks with c at the block's start: then both parts have the sign of the whole, or are small, and nothing is
lost to cancellation at 128k tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# rows of queries (tokens times query heads per KV head) that share one call: bounds the mask of a block
ROWS = 2048
# elements of a block's bias in float32, where one is built: 128 MB
BIAS_ELEMENTS = 1 << 25


class Mask(Protocol):
    """What a query may see, asked for one block at a time.

    ``ahead`` tells that some see later ones of their picture: those entries have not begun to fade.
    """

    ahead: bool

    def block(self, queries: range, keys: range) -> torch.Tensor:
        """(B or 1, 1, queries, keys) bool, True where visible."""

    def first_key(self, queries: range) -> int:
        """No key before this one is visible to any of these queries."""

    def last_key(self, queries: range) -> int:
        """Nor is this one, or any after it."""


def decay_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor | None,
    mask: Mask,
    scale: float,
    rows: int = ROWS,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a sequence on itself as its mask says, decayed if ``log_beta`` is given.

    Args:
        query: (B, H·G, T, D); ``key`` (B, H, T, D); ``value`` (B, H, T, Dv).
        log_beta: (B, T, H) float32, at most 0.
        mask: what is visible.
        scale: of the products of queries and keys.
        rows: G times the number of tokens of a block of queries.
        sinks: (H·G,) logits that take part in each softmax and have no value.

    Returns:
        (B, H·G, T, Dv), the type of ``value``.
    """
    batch, heads, tokens = key.shape[:3]
    groups = query.shape[1] // heads
    step = max(1, rows // groups)
    if mask.ahead and log_beta is not None:
        step = max(1, min(step, BIAS_ELEMENTS // (batch * heads * groups * tokens)))
    # float16 cannot hold age·log β, and pieces of it would be subnormal
    compute = torch.float32 if query.dtype == torch.float16 else query.dtype
    query, key, padded = query.to(compute), key.to(compute), value.to(compute)
    out = []
    for start in range(0, tokens, step):
        block = range(start, min(start + step, tokens))
        tensors = (query[:, :, block.start : block.stop], key, padded, log_beta)
        if torch.is_grad_enabled() and tokens > step:
            # the extended keys of every block together would take T²·D / step
            made = checkpoint(_block, *tensors, mask, block, scale, sinks, use_reentrant=False)
        else:
            made = _block(*tensors, mask, block, scale, sinks)
        out.append(made.view(batch, heads * groups, len(block), -1))
    return torch.cat(out, 2).to(value.dtype)


def _block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor | None,
    mask: Mask,
    block: range,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One block of queries against the keys it may see: (B, H, G·t, Dv)."""
    (batch, heads, _, width), count = key.shape, len(block)
    keys = range(mask.first_key(block), mask.last_key(block))
    groups = query.shape[1] // heads
    # query heads of a KV head become rows, so that keys are not repeated
    query = query.reshape(batch, heads, groups * count, width)
    key, value = key[:, :, keys.start : keys.stop], value[:, :, keys.start : keys.stop]
    size = value.shape[-1]
    if log_beta is not None and mask.ahead:
        return _with_bias(query, key, value, log_beta, mask, block, keys, scale, sinks)
    if log_beta is not None:
        query, key = _extend(query, key, log_beta[:, keys.start : keys.stop], block, keys, scale)
    seen = mask.block(block, keys)[:, :, None].expand(-1, 1, groups, count, len(keys))
    seen = seen.reshape(-1, 1, groups * count, len(keys))
    if sinks is not None:
        query, key = _add_sink(query, key, sinks.view(heads, groups, 1), scale)
        # a key without a value that all may see
        value, seen = F.pad(value, (0, 0, 0, 1)), F.pad(seen, (0, 1), value=True)
    # fused kernels want one head size, a multiple of 8
    wide = -(-max(query.shape[-1], size) // 8) * 8
    query, key, value = (F.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
    return out[..., :size]


def _with_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor,
    mask: Mask,
    block: range,
    keys: range,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """A block whose queries see later keys: ``max(t - i, 0)·log β_i`` has no low rank, and is built."""
    (batch, heads, rows, _), count = query.shape, len(block)
    at, other = (torch.arange(x.start, x.stop, device=key.device) for x in (block, keys))
    age = (at[:, None] - other).clamp(min=0)
    bias = age * log_beta[:, keys.start : keys.stop].transpose(1, 2)[:, :, None]
    bias = bias.masked_fill(~mask.block(block, keys), -math.inf)
    logits = scale * query.float() @ key.float().transpose(2, 3)
    logits = logits.view(batch, heads, -1, count, len(keys)) + bias[:, :, None]
    if sinks is not None:
        sink = sinks.float().view(1, heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    weight = logits.softmax(-1)[..., : len(keys)].reshape(batch, heads, rows, len(keys))
    return (weight @ value.float()).to(value.dtype)


def _extend(
    query: torch.Tensor,
    key: torch.Tensor,
    log_beta: torch.Tensor,
    block: range,
    keys: range,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the columns whose product is ``(t - i)·log β_i / scale``."""
    fade = log_beta.transpose(1, 2).unsqueeze(-1) / scale
    before = (block.start - torch.arange(keys.start, keys.stop, device=key.device)).unsqueeze(-1) * fade
    age = torch.arange(len(block), device=query.device, dtype=torch.float32)
    age = age.repeat(query.shape[2] // len(block)).unsqueeze(-1).expand(*query.shape[:3], 1)
    parts = pieces(fade, key.dtype)
    columns = [piece.expand(*query.shape[:3], len(parts)) for piece in pieces(age, query.dtype, len(block))]
    ones = torch.ones((), dtype=query.dtype, device=query.device).expand(*query.shape[:3], len(parts))
    query = torch.cat([query, *columns, ones], -1)
    key = torch.cat([key, *parts * len(columns), *pieces(before, key.dtype)], -1)
    return query, key


def _add_sink(
    query: torch.Tensor, key: torch.Tensor, sinks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append a key whose product with each query is the sink of its head, by columns only it has."""
    batch, heads, rows, _ = query.shape
    sinks = (
        sinks.float().expand(heads, sinks.shape[1], rows // sinks.shape[1]).reshape(1, heads, rows, 1) / scale
    )
    columns = [piece.expand(batch, heads, rows, 1) for piece in pieces(sinks, query.dtype)]
    query = torch.cat([query, *columns], -1)
    key = F.pad(key, (0, len(columns), 0, 1))
    key[:, :, -1, -len(columns) :] = 1
    return query, key


def pieces(x: torch.Tensor, dtype: torch.dtype, integers_below: int | None = None) -> list[torch.Tensor]:
    """Tensors of ``dtype`` whose sum is the float32 tensor ``x``: one for float32, three for bfloat16.

    Products of pieces are summed in float32 inside a fused kernel, so half-precision attention can carry
    float32 columns. Fewer pieces hold integers of few bits.
    """
    mantissa = 1 - round(math.log2(torch.finfo(dtype).eps))
    bits = 24 if integers_below is None else max(1, (integers_below - 1).bit_length())
    found: list[torch.Tensor] = []
    for _ in range(-(-bits // mantissa)):
        piece = x.to(dtype)
        found.append(piece)
        # the first piece alone carries the gradient, which is the same for all
        x = (x - piece.float()).detach()
    return found


def naive_decay_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor | None,
    mask: Mask,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of :func:`decay_attention`: the whole T×T matrix."""
    batch, heads, tokens = key.shape[:3]
    query = query.view(batch, heads, -1, tokens, query.shape[-1])
    logits = torch.einsum("bhgtd,bhid->bhgti", query, key) * scale
    if log_beta is not None:
        place = torch.arange(tokens, device=key.device)
        age = (place[:, None] - place).clamp(min=0)
        logits = logits + age * log_beta.transpose(1, 2)[:, :, None, None, :]
    everything = range(tokens)
    logits = logits.masked_fill(~mask.block(everything, everything)[:, :, None], -torch.inf)
    if sinks is not None:
        sink = sinks.view(1, heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink.to(logits)], -1)
    weight = logits.softmax(-1)[..., :tokens]
    return torch.einsum("bhgti,bhid->bhgtd", weight, value).flatten(1, 2)


class PackedMask:
    """Causal within each document of a row. ``starts`` (B, T): where the token's document begins.

    Where ``ends`` (B, T) are given a token sees all before there; it is its picture's end, or the next token.
    """

    def __init__(self, starts: torch.Tensor, ends: torch.Tensor | None = None):
        self.starts, self.ends = starts, ends
        self.ahead = ends is not None
        self._first: Sequence[int] = starts.amin(0).tolist()
        self._last: Sequence[int] = [] if ends is None else ends.amax(0).tolist()
        # where each token's picture begins, for it is seen whole, however narrow a window
        self._whole: Sequence[int] = [] if ends is None else torch.searchsorted(ends, ends).amin(0).tolist()

    def block(self, queries: range, keys: range) -> torch.Tensor:
        device = self.starts.device
        column = torch.arange(keys.start, keys.stop, device=device)[None]
        begin = self.starts[:, None, queries.start : queries.stop, None]
        if self.ends is not None:
            return (column < self.ends[:, None, queries.start : queries.stop, None]) & (column >= begin)
        row = torch.arange(queries.start, queries.stop, device=device)[:, None]
        return (column <= row) & (column >= begin)

    def first_key(self, queries: range, window: int | None = None) -> int:
        reach = queries.start - window + 1 if window else 0
        if self.ahead:
            reach = min(reach, self._whole[queries.start])
        return max(self._first[queries.start], reach)

    def last_key(self, queries: range) -> int:
        return max(self._last[queries.start : queries.stop]) if self.ahead else queries.stop
