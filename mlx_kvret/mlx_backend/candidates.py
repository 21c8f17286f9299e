"""All that competes in a compaction of rows that are due together: the entries they keep, and newcomers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.schedule import Move
from ..core.types import Ints
from . import kernels
from .kernels import compaction_plan
from .observed import log_beta_in, log_beta_of, shortened
from .pool import Pool
from .row import Row
from .selection import keydiff_score, retention_score, static_score

Due = Sequence[tuple[Row, Move]]


@dataclass(frozen=True)
class Candidates:
    """Of each group of every row its C slots, then its newcomers, head by head: all arrays (groups, C + N).

    A ``head`` of as many as there are marks no entry: a free slot, or what a row has fewer newcomers than
    others. ``retention`` is what is stored, ``must`` tells what sinks and windows protect.
    """

    score: mx.array
    retention: mx.array
    position: mx.array
    head: mx.array
    must: mx.array


def candidates(due: Due, pool: Pool, newest: list[tuple[mx.array, mx.array]]) -> Candidates:
    """What competes where the oldest tokens of the newest ones join, all rows' groups one after another.

    ``newest`` are keys and values (n, D) of those tokens by layer, each row's heads one after another.
    """
    log_beta, column = _retention(due)
    learned = due[0][0].config.policy == "learned"
    numbers = np.array([_numbers(row) for row, _ in due], np.int32)
    given = log_beta, column, numbers, learned
    found = Candidates(
        *kernels.either(
            lambda: candidates_kernel(pool, *given),
            lambda: candidates_reference(pool, *given),
        )
    )
    if due[0][0].config.policy != "keydiff":
        return found
    score = _keydiff(due, pool, found.head, [keys for keys, _ in newest], column.shape[1])
    return Candidates(score, found.retention, found.position, found.head, found.must)


def candidates_kernel(
    pool: Pool, newest: mx.array, column: Ints, numbers: Ints, learned: bool
) -> list[mx.array]:
    """:func:`candidates_reference` in one launch."""
    accounts, sizes = (
        (pool.retention, pool.position, pool.owner),
        (pool.groups, pool.size, pool.capacity * pool.size),
    )
    return compaction_plan.candidates(accounts, sizes, newest, column, numbers, learned)


def candidates_reference(
    pool: Pool, newest: mx.array, column: Ints, numbers: Ints, learned: bool
) -> list[mx.array]:
    """In plain MLX, row by row: score, retention, position, head and must, each (R·groups, C + N).

    ``newest`` (heads, K) is known of new tokens, ``column`` (R, n) which of them are a row's, below 0 if
    none; ``numbers`` (R, 6) are its slab, first new position, seen, look-ahead, sinks and window.
    """
    found, groups, heads = [], (pool.groups, -1), pool.heads
    for own, (slab, start, seen, lookahead, sinks, window) in zip(column, numbers.tolist(), strict=True):
        wide = (heads, len(own))
        real = mx.array(own >= 0)
        place = mx.where(real, mx.arange(start, start + len(own), dtype=mx.int32), 0)
        head = mx.where(real, mx.arange(heads, dtype=mx.int32)[:, None], heads)
        new = _columns(newest, own), mx.broadcast_to(place, wide), head
        old = (pool.rows(array, slab) for array in (pool.retention, pool.position, pool.owner))
        joined = [mx.concatenate([a, b.reshape(groups)], axis=1) for a, b in zip(old, new, strict=True)]
        retention, position, _ = joined
        score = retention_score(retention, position, seen, lookahead) if learned else retention
        must = (position < sinks) | (position >= seen - window)
        found.append([score, *joined, must])
    return (
        found[0] if len(found) == 1 else [mx.concatenate(list(parts)) for parts in zip(*found, strict=True)]
    )


def _columns(array: mx.array, own: Ints) -> mx.array:
    """Columns (heads, n) of an array (heads, K), zeros where ``own`` (n,) is below 0."""
    if (own == np.arange(own[0], own[0] + len(own))).all() and own[0] >= 0:
        return array[:, int(own[0]) : int(own[-1]) + 1]
    index = mx.array(np.maximum(own, 0).astype(np.int32))
    return mx.where(mx.array(own >= 0), array[:, index], 0.0)


def _numbers(row: Row) -> list[int]:
    config = row.config
    return [
        *(row.slab, row.seen - row.length, row.seen),
        *(config.lookahead, config.sinks, config.window),
    ]


def retention_of(row: Row, tokens: int) -> mx.array:
    """What is stored with the oldest ``tokens`` of a row's window, (L, H, tokens) float32."""
    if row.config.policy != "learned":
        return _static(row, tokens)
    row.arena.score()
    return log_beta_of(shortened(row.pieces, newest=row.length - tokens))


def _retention(due: Due) -> tuple[mx.array, Ints]:
    """What is stored with newcomers, (heads, K) float32, and which columns are each row's (R, n), or -1."""
    if due[0][0].config.policy == "learned":
        due[0][0].arena.score()
        found, columns = log_beta_in(
            [shortened(row.pieces, newest=row.length - move.tokens) for row, move in due]
        )
    else:
        parts = [_static(row, move.tokens) for row, move in due]
        found = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        ends = np.cumsum([move.tokens for _, move in due])
        columns = [np.arange(end - move.tokens, end) for (_, move), end in zip(due, ends, strict=True)]
    column = np.full((len(due), max(map(len, columns))), -1, np.int32)
    for place, own in enumerate(columns):
        column[place, : len(own)] = own
    return found.reshape(-1, found.shape[-1]), column


def _static(row: Row, tokens: int) -> mx.array:
    """Of a baseline: (L, H, tokens) of the oldest of a row's newest tokens."""
    start, heads, share = row.seen - row.length, row.arena.shape.kv_heads, row.arena.share
    place = np.arange(start, start + tokens)
    layers = range(row.arena.shape.layers)
    keys = [row.window(layer)[0][0, :, :tokens] for layer in layers]
    if row.config.policy == "knorm":
        keys = [row.arena.pool.as_kept(one) for one in keys]
    first = [layer * heads if share is None else share.first_head(layer) for layer in layers]
    return mx.stack([static_score(row.config, keys[layer], first[layer], place) for layer in layers])


def _keydiff(due: Due, pool: Pool, head: mx.array, newest: list[mx.array], wide: int) -> mx.array:
    """Row by row: how much each key is like the mean of its head."""
    shape, found, begin = due[0][0].arena.shape, [], 0
    for place, (row, move) in enumerate(due):
        end = begin + shape.kv_heads * move.tokens
        new = mx.stack([keys[begin:end].reshape(shape.kv_heads, move.tokens, -1) for keys in newest])
        new = mx.pad(pool.as_kept(new), [(0, 0), (0, 0), (0, wide - move.tokens), (0, 0)])
        keys = [pool.slab_keys(row.slab), new.reshape(pool.groups, -1, new.shape[-1])]
        own = head[place * pool.groups : (place + 1) * pool.groups]
        found.append(keydiff_score(mx.concatenate(keys, axis=1), own, shape.heads))
        begin = end
    return found[0] if len(found) == 1 else mx.concatenate(found)
