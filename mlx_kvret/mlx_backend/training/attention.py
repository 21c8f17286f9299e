"""Attention in which every entry decays with its age: logits of query t and key i get ``(t - i)·log β_i``.

Queries are taken in blocks against all keys they may see, and each block is worked out again for the
gradient, so that no T×T matrix is ever in memory. MLX's fused attention would not help: where a gradient is
wanted it builds that matrix, and its kernels do not take head sizes extended by the columns of the bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...core.types import Ints
from .blocks import after, with_gradient

# logits of one block: 128 MB in float32
BLOCK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class PackedMask:
    """Causal within each document of a row, and within a sliding window if there is one.

    ``starts`` (B, T): where the token's document begins, not decreasing. Where ``ends`` (B, T) are given
    tokens that have the same one are a picture's, and see each other: those of
    :func:`mlx_kvret.training.pictures.ends_of`.
    """

    starts: Ints
    window: int | None = None
    ends: Ints | None = None

    def block(self, queries: slice, keys: slice) -> mx.array:
        """(B, queries, keys) bool, True where visible."""
        row, column = _places(queries)[:, None], _places(keys)
        begin = mx.array(self.starts[:, queries].astype(np.int32))[..., None]
        if self.window:
            begin = mx.maximum(begin, row - self.window + 1)
        seen = (column <= row) & (column >= begin)
        if self.ends is None:
            return seen
        mine, other = (mx.array(self.ends[:, places].astype(np.int32)) for places in (queries, keys))
        return seen | (mine[..., None] == other[:, None])

    def keys(self, queries: slice) -> slice:
        """The keys from the first to the last one that any of these queries may see."""
        begin, end = int(self.starts[:, queries.start].min()), queries.stop
        reach = queries.start - self.window + 1 if self.window else 0
        if self.ends is not None:
            # a picture is seen whole, however narrow the window
            whole = self.ends == self.ends[:, queries.start, None]
            reach, end = min(reach, int(whole.argmax(1).min())), int(self.ends[:, queries].max())
        return slice(max(begin, reach), end)

    def blocks(self, elements: int) -> Iterator[tuple[slice, slice]]:
        """Slices of queries and of the keys they may see; ``elements`` pairs of a query and a key in each."""
        tokens = self.starts.shape[1]
        step = max(1, elements // tokens)
        for start in range(0, tokens, step):
            queries = slice(start, min(start + step, tokens))
            yield queries, self.keys(queries)


def ages(queries: slice, keys: slice) -> mx.array:
    """t - i (queries, keys) float32, 0 where the key is younger."""
    return mx.maximum(_places(queries)[:, None] - _places(keys), 0).astype(mx.float32)


def _places(where: slice) -> mx.array:
    return mx.arange(where.start, where.stop, dtype=mx.int32)


def decay_attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    log_beta: mx.array | None,
    mask: PackedMask,
    scale: float,
    sinks: mx.array | None = None,
    elements: int | None = None,
) -> mx.array:
    """Attention of a sequence on itself as its mask says, decayed if ``log_beta`` is given; in float32.

    Args:
        query: (B, H·G, T, D); ``key`` (B, H, T, D); ``value`` (B, H, T, Dv).
        log_beta: (B, T, H) float32, at most 0.
        scale: of the products of queries and keys.
        sinks: (H·G,) logits that take part in each softmax and have no value.
        elements: most logits of a block of queries, BLOCK_ELEMENTS unless given.

    Returns:
        (B, H·G, T, Dv), the type of ``value``.
    """
    batch, heads, tokens, width = key.shape
    groups = query.shape[1] // heads
    block = _Blocks(mask, scale, sinks, (elements or BLOCK_ELEMENTS) // (batch * heads * groups))
    attend = with_gradient(block.forward, block.backward)
    inputs = [query.reshape(batch, heads, groups, tokens, width), key, value]
    if log_beta is not None:
        inputs.append(log_beta.swapaxes(1, 2))
    out = attend(*(x.astype(mx.float32) for x in inputs))
    return out.reshape(batch, heads * groups, tokens, -1).astype(value.dtype)


@dataclass(frozen=True)
class _Blocks:
    """Forward and backward pass over blocks; query (B, H, G, T, D), log β (B, H, T), all in float32."""

    mask: PackedMask
    scale: float
    sinks: mx.array | None
    elements: int

    def forward(
        self, query: mx.array, key: mx.array, value: mx.array, log_beta: mx.array | None = None
    ) -> mx.array:
        out: list[mx.array] = []
        for queries, keys in self.mask.blocks(self.elements):
            mine = after(query[:, :, :, queries], out[-1] if out else None)
            weight = self._weights(mine, key, log_beta, queries, keys)
            out.append(_unfold(_fold(weight) @ value[:, :, keys], mine))
        return mx.concatenate(out, 3)

    def backward(
        self, primals: tuple[mx.array, ...], gradient: mx.array, out: mx.array
    ) -> tuple[mx.array, ...]:
        """Gradients of all inputs: a softmax's from its weights and outputs, as flash attention has it."""
        query, key, value, *fade = primals
        log_beta = fade[0] if fade else None
        of_query: list[mx.array] = []
        sums = [mx.zeros_like(x) for x in primals[1:]]
        for queries, keys in self.mask.blocks(self.elements):
            mine = after(query[:, :, :, queries], sums[0])
            weight = self._weights(mine, key, log_beta, queries, keys)
            given = gradient[:, :, :, queries]
            direct = _unfold(_fold(given) @ value[:, :, keys].swapaxes(2, 3), mine)
            of_logits = weight * (direct - (given * out[:, :, :, queries]).sum(-1, keepdims=True))
            flat = _fold(of_logits)
            of_query.append(_unfold(self.scale * (flat @ key[:, :, keys]), mine))
            parts = [
                self.scale * (flat.swapaxes(2, 3) @ _fold(mine)),
                _fold(weight).swapaxes(2, 3) @ _fold(given),
            ]
            if fade:
                parts.append((of_logits.sum(2) * ages(queries, keys)).sum(2))
            sums = [total.at[:, :, keys].add(part) for total, part in zip(sums, parts, strict=True)]
            # the next block waits for all of this one
            sums[0] = mx.depends(sums[:1], [*sums[1:], of_query[-1]])[0]
        return (mx.concatenate(of_query, 3), *sums)

    def _weights(
        self, query: mx.array, key: mx.array, log_beta: mx.array | None, queries: slice, keys: slice
    ) -> mx.array:
        """The softmax (B, H, G, t, i) of a block of queries over its keys."""
        logits = _unfold(self.scale * (_fold(query) @ key[:, :, keys].swapaxes(2, 3)), query)
        if log_beta is not None:
            logits = logits + (ages(queries, keys) * log_beta[:, :, None, keys])[:, :, None]
        logits = mx.where(self.mask.block(queries, keys)[:, None, None], logits, -math.inf)
        if self.sinks is None:
            return mx.softmax(logits, -1)
        sink = self.sinks.astype(mx.float32).reshape(1, *logits.shape[1:3], 1, 1)
        sink = mx.broadcast_to(sink, (*logits.shape[:4], 1))
        return mx.softmax(mx.concatenate([logits, sink], -1), -1)[..., :-1]


def _fold(x: mx.array) -> mx.array:
    """(B, H, G, t, ...) to (B, H, G·t, ...): query heads become rows, so that keys are not repeated."""
    return x.flatten(2, 3)


def _unfold(x: mx.array, like: mx.array) -> mx.array:
    return x.reshape(*like.shape[:4], -1)


def naive_decay_attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    log_beta: mx.array | None,
    mask: PackedMask,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """The specification of :func:`decay_attention`: the whole T×T matrix."""
    everything, groups = slice(0, key.shape[2]), query.shape[1] // key.shape[1]
    key, value = (mx.repeat(x, groups, 1) for x in (key, value))
    logits = scale * query @ key.swapaxes(2, 3)
    if log_beta is not None:
        place = mx.arange(everything.stop)
        age = mx.maximum(place[:, None] - place, 0).astype(log_beta.dtype)
        logits = logits + age * mx.repeat(log_beta.swapaxes(1, 2), groups, 1)[:, :, None]
    logits = mx.where(mask.block(everything, everything)[:, None], logits, -math.inf)
    if sinks is not None:
        sink = mx.broadcast_to(sinks.astype(logits.dtype)[:, None, None], (*logits.shape[:3], 1))
        logits = mx.concatenate([logits, sink], -1)
    return mx.softmax(logits, -1)[..., : everything.stop] @ value
