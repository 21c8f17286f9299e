"""Rows' newest tokens decided upon: the best entries of each row stay, or join, in the pool."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.schedule import grown, together
from ..core.shares import own_due
from ..core.types import Ints
from .candidates import Due, candidates
from .observed import known, log_beta_of, shortened
from .pool import Pool
from .recent import Pair, Recent
from .row import Row
from .selection import Asked, select_rows

After = tuple[Row, dict[str, Any]]


def compacted(due: Due, pool: Pool, recent: Recent) -> list[After]:
    """The oldest tokens of rows' windows moved into ``pool``; groups that are due select first.

    All rows of an arena that are due at a time select and move in the same operations, unless they are too
    many entries. ``pool`` and ``recent`` are changed; returns what becomes of the rows.
    """
    first = due[0][0]
    needed = max(move.capacity for _, move in due)
    if needed > pool.capacity:
        most = max(row.schedule.most for row, _ in due)
        like = first.window(0, recent)
        pool.grow(grown(needed, pool.capacity, most), *like)
    entries = (pool.capacity + max(move.tokens for _, move in due)) * pool.heads
    size = together(entries, first.arena.share is not None)
    parts = [due[start : start + size] for start in range(0, len(due), size)]
    return [after for part in parts for after in _compacted(part, pool, recent)]


def _compacted(due: Due, pool: Pool, recent: Recent) -> list[After]:
    arena, slabs = due[0][0].arena, tuple(row.slab for row, _ in due)
    newest = _newest(due, recent)
    found = candidates(due, pool, newest)
    keep = found.head < pool.heads
    if any(move.due.any() for _, move in due):
        asked = [
            Asked(row.seen, row.config, own_due(arena.share, move.due, row.config), row.pictures)
            for row, move in due
        ]
        keep = select_rows(
            found.score, found.must, found.position, found.head, asked, pool.size, pool.heads, arena.share
        )
    slots = pool.capacity * pool.size
    new = (found.retention[:, slots:], found.position[:, slots:], found.head[:, slots:])
    if arena.share is not None:
        keep = _with_room(pool, keep, due)
    places = pool.destinations(keep, slabs)
    slots = pool.capacity * pool.size
    pool.admit(keep[:, :slots], places, keep[:, slots:], *new, slabs)
    for own, (keys, values) in zip(_by_layer(places, due, arena.shape.layers), newest, strict=True):
        pool.fill(own, keys, values)
    after = []
    for row, move in due:
        schedule = copy.copy(row.schedule)
        rest = folded(row, recent, move.tokens)
        schedule.done(move, row.seen - row.length, _counted(row, pool))
        after.append((row, rest | {"schedule": schedule}))
    return after


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


def _newest(due: Due, recent: Recent) -> list[Pair]:
    """Keys and values (n, D) that are to move, by layer: each row's heads one after another."""
    layers = range(due[0][0].arena.shape.layers)
    if len(due) > 1 and all(row.wide is None for row, _ in due):
        return recent.gathered([(row.slab, move.tokens) for row, move in due])
    found = []
    for layer in layers:
        windows = [row.window(layer, recent) for row, _ in due]
        parts = [
            [window[side][0, :, : move.tokens] for window, (_, move) in zip(windows, due, strict=True)]
            for side in (0, 1)
        ]
        keys, values = ([part.reshape(-1, part.shape[-1]) for part in side] for side in parts)
        found.append((mx.concatenate(keys), mx.concatenate(values)))
    return found


def _by_layer(places: mx.array, due: Due, layers: int) -> mx.array:
    """Slots of newcomers (R·groups, N) as (layers, n), in the order of :func:`_newest`."""
    places = places.reshape(len(due), layers, -1)
    if len({move.tokens for _, move in due}) == 1:
        return places.swapaxes(0, 1).reshape(layers, -1)
    tokens = max(move.tokens for _, move in due)
    wide = np.arange(places[0, 0].size).reshape(-1, tokens)
    rows = [row * wide.size + wide[:, : move.tokens].reshape(-1) for row, (_, move) in enumerate(due)]
    return places.swapaxes(0, 1).reshape(layers, -1)[:, mx.array(np.concatenate(rows).astype(np.int32))]


def _with_room(pool: Pool, keep: mx.array, due: Due) -> mx.array:
    """``keep`` once the pool has room for a rank's entries, of which there may be more than its mean."""
    most, before = int(keep.sum(1).max()), pool.capacity
    need = -(-most // pool.size)
    if need <= before:
        return keep
    pool.grow(need + need // 8, *due[0][0].window(0))
    return mx.pad(keep, [(0, 0), ((pool.capacity - before) * pool.size, 0)])


def _counted(row: Row, pool: Pool) -> Ints | None:
    """Entries per group where a threshold decides, read from the device; None where it is arithmetic."""
    if row.config.threshold is None:
        return None
    counts = np.diff(pool.lookup.on_host(row.slab)[:: pool.size])
    share = row.arena.share
    return counts if share is None else share.totals(counts, row.config)
