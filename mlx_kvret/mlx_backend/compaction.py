"""A row's newest tokens decided upon: its best entries of all stay, or join, in the pool."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.schedule import Move
from ..core.types import Ints
from .observed import known, log_beta_of, shortened
from .pool import Pool
from .recent import Recent
from .row import Row
from .selection import keydiff_score, retention_score, select, static_score


def compacted(row: Row, move: Move, pool: Pool, recent: Recent) -> dict[str, Any]:
    """The oldest tokens of the window moved into ``pool``; groups that are due select first.

    ``pool`` and ``recent`` are changed; returns what becomes of the row.
    """
    shape, tokens, share, slab = row.arena.shape, move.tokens, row.arena.share, row.slab
    start, config = row.seen - row.length, row.config
    due = move.due if share is None else move.due[share.groups(config)]
    retention = retention_of(row, tokens)
    schedule = copy.copy(row.schedule)
    newest = [row.window(layer, recent) for layer in range(shape.layers)]
    if move.capacity > pool.capacity:
        room = max(move.capacity, 2 * pool.capacity)
        pool.grow(min(schedule.most, room), *newest[0])
    rows = (pool.groups, -1)
    position = mx.broadcast_to(mx.arange(start, start + tokens, dtype=mx.int32), (shape.heads, tokens))
    head = mx.broadcast_to(mx.arange(shape.heads, dtype=mx.int32)[:, None], (shape.heads, tokens))
    new = retention.reshape(rows), position.reshape(rows), head.reshape(rows)

    old = tuple(pool.rows(array, slab) for array in (pool.retention, pool.position, pool.owner))
    stays, survives = old[2] < shape.heads, mx.ones(new[2].shape, mx.bool_)
    if move.due.any():
        joined = [mx.concatenate([a, b], axis=1) for a, b in zip(old, new, strict=True)]
        score = _score(row, pool, joined, newest, tokens)
        args = score, joined[1], joined[2], row.seen, config, pool.size, shape.heads, row.pictures
        keep = select(*args, share, due)
        if not due.all():
            keep = mx.where(mx.array(due)[:, None], keep, joined[2] < shape.heads)
        stays, survives = keep[:, : stays.shape[1]], keep[:, stays.shape[1] :]
    if share is not None:
        stays = _with_room(pool, stays, survives, *newest[0])
    slots = pool.destinations(stays, survives, slab)
    pool.admit(stays, slots, survives, *new, slab)
    by_layer = slots.reshape(shape.layers, -1)
    for layer, pair in enumerate(newest):
        keys, values = (array[0, :, :tokens] for array in pair)
        pool.fill(by_layer[layer], keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1]))
    rest = folded(row, recent, tokens)
    schedule.done(move, start, _counted(row, pool))
    return rest | {"schedule": schedule}


def folded(row: Row, recent: Recent, tokens: int = 0) -> dict[str, Any]:
    """The newest tokens of the row but the oldest ``tokens``, at the beginning of its window."""
    left = row.length - tokens
    if left:
        for layer in range(row.arena.shape.layers):
            keys, values = (array[:, :, tokens:] for array in row.window(layer, recent))
            recent.put(layer, row.slab, keys, values)
    pieces = shortened(row.pieces, oldest=tokens) if row.pieces and left else []
    if pieces and row.wide is not None:
        # of their own: what is left would hold on to the log β of a whole chunk
        row.arena.score()
        pieces = known(log_beta_of(pieces) + 0)
    return {"length": left, "wide": None, "pieces": pieces}


def retention_of(row: Row, tokens: int) -> mx.array:
    """What is stored with the oldest ``tokens`` of the window, (L, H, tokens) float32."""
    if row.config.policy == "learned":
        row.arena.score()
        return log_beta_of(shortened(row.pieces, newest=row.length - tokens))
    start, heads, share = row.seen - row.length, row.arena.shape.kv_heads, row.arena.share
    place = np.arange(start, start + tokens)
    layers = range(row.arena.shape.layers)
    keys = [row.window(layer)[0][0, :, :tokens] for layer in layers]
    if row.config.policy == "knorm":
        keys = [row.arena.pool.as_kept(one) for one in keys]
    first = [layer * heads if share is None else share.first_head(layer) for layer in layers]
    return mx.stack([static_score(row.config, keys[layer], first[layer], place) for layer in layers])


def _score(
    row: Row, pool: Pool, candidates: list[mx.array], newest: list[tuple[mx.array, mx.array]], tokens: int
) -> mx.array:
    retention, position, head = candidates
    if row.config.policy == "learned":
        return retention_score(retention, position, row.seen, row.config.lookahead)
    if row.config.policy == "keydiff":
        new = pool.as_kept(mx.stack([keys[0, :, :tokens] for keys, _ in newest]))
        keys = mx.concatenate([pool.slab_keys(row.slab), new.reshape(pool.groups, -1, new.shape[-1])], axis=1)
        return keydiff_score(keys, head, row.arena.shape.heads)
    return retention


def _with_room(pool: Pool, stays: mx.array, survives: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """``stays`` once the pool has room for a rank's entries, of which there may be more than its mean."""
    most = int((stays.sum(1) + survives.sum(1)).max())
    need, before = -(-most // pool.size), pool.capacity
    if need <= before:
        return stays
    pool.grow(need + need // 8, keys, values)
    new = mx.zeros((pool.groups, (pool.capacity - before) * pool.size), mx.bool_)
    return mx.concatenate([new, stays], axis=1)


def _counted(row: Row, pool: Pool) -> Ints | None:
    """Entries per group where a threshold decides, read from the device; None where it is arithmetic."""
    if row.config.threshold is None:
        return None
    counts = np.diff(pool.lookup.on_host(row.slab)[:: pool.size])
    share = row.arena.share
    return counts if share is None else share.totals(counts, row.config)
