"""What a compaction of one sequence does, decided upon before anything changes."""

from __future__ import annotations

import copy

import numpy as np
import torch

from mlx_kvret.core.schedule import Move
from mlx_kvret.core.state import State

from .kernels.dispatch import fill, select
from .pool import Slab
from .row import Row
from .selection import keydiff_score, retention_score

Part = tuple[torch.Tensor, torch.Tensor]


class Compaction:
    """Moves and accounts of one row; done twice, because it was broken off, it comes to the same.

    ``moves`` are slots, survivors, keys and values (layers, H, N, D); ``arrays`` as of :meth:`Slab.admitted`;
    ``rest`` what goes to the beginning of the window.
    """

    def __init__(
        self,
        row: Row,
        moves: list[tuple[torch.Tensor, ...]],
        arrays: dict[str, torch.Tensor],
        rest: list[tuple[torch.Tensor, torch.Tensor]],
        after: State,
    ) -> None:
        self._slab, self._moves, self._arrays, self._rest, self._after = row.slab, moves, arrays, rest, after

    def put(self) -> None:
        """Move keys and values, then the accounts."""
        for slots, survives, keys, values in self._moves:
            fill(self._slab, slots, survives, keys, values)
        self._slab.take(self._arrays)
        for place, left in self._rest:
            place.copy_(left)
        self._after.put()


class Fold:
    """A chunk that has become short enough for the window."""

    def __init__(self, row: Row) -> None:
        self._rest, self._after = _remaining(row, 0), State([(row, {"chunk": None})])

    def put(self) -> None:
        for place, left in self._rest:
            place.copy_(left)
        self._after.put()


def settle(row: Row) -> None:
    """Carry out what is due of one row."""
    move = row.schedule.next(row.seen, row.length)
    if move is not None:
        row.own()
        row.arena.put(_compacted(row, move))
    elif row.chunk is not None and row.length <= row.arena.limit:
        row.own()
        row.arena.put(Fold(row))


def _compacted(row: Row, move: Move) -> Compaction:
    """The oldest of the newest tokens moved into the pool; groups that are due select first."""
    arena, tokens, start = row.arena, move.tokens, row.seen - row.length
    pool = arena.pool
    if move.capacity > pool.capacity:
        capacity = min(row.schedule.most, max(move.capacity, 2 * pool.capacity))
        pool.grow(max(capacity, move.capacity), *row.newest(0, 0, 1))
    slab = row.slab
    new = _newcomers(row, start, tokens)
    old = slab.rows(slab.retention), slab.rows(slab.position), slab.rows(slab.owner)
    stays, survives = old[2] < pool.heads, torch.ones_like(new[2], dtype=torch.bool)
    if move.due.any():
        joined = [torch.cat([a, b], 1) for a, b in zip(old, new, strict=True)]
        score = _score(row, slab, joined, tokens)
        keep = select(score, joined[1], joined[2], row.seen, row.config, arena.size, pool.heads)
        if not move.due.all():
            due = torch.from_numpy(move.due).to(arena.device, non_blocking=True)[:, None]
            keep = torch.where(due, keep, joined[2] < pool.heads)
        stays, survives = keep[:, : stays.shape[1]], keep[:, stays.shape[1] :]
    slots = slab.destinations(stays, survives)
    arrays = slab.admitted(stays, slots, survives, *new)
    counts = None
    if row.config.threshold is not None:
        counts = np.diff(arrays["offsets"].cpu().numpy()[:: arena.size])
    schedule = copy.copy(row.schedule)
    schedule.done(move, start, counts)
    left = row.length - tokens
    scored = left if arena.gates is not None else 0
    after = State([(row, {"schedule": schedule, "length": left, "scored": scored, "chunk": None})])
    return Compaction(row, _moves(row, slots, survives, tokens), arrays, _remaining(row, tokens), after)


def _moves(
    row: Row, slots: torch.Tensor, survives: torch.Tensor, tokens: int
) -> list[tuple[torch.Tensor, ...]]:
    """Slots, survivors, keys and values; of all layers at once where they stand in one array."""
    recent, index = row.arena.recent, row.hold.index
    if row.chunk is None:
        assert recent.keys is not None and recent.values is not None
        held = (a[:, index, :, :tokens] for a in (recent.keys, recent.values))
        return [(slots.flatten(), survives.flatten(), *held)]
    layers = range(row.arena.shape.layers)
    by_layer = [a.reshape(len(layers), -1) for a in (slots, survives)]
    return [(*(a[layer] for a in by_layer), *row.newest(layer, 0, tokens)) for layer in layers]


def _remaining(row: Row, tokens: int) -> list[Part]:
    """Places in the window, and what goes there once the oldest ``tokens`` are gone."""
    arena, end = row.arena, row.length
    left, index, parts = end - tokens, row.hold.index, list[Part]()
    if not left:
        return parts
    for layer in range(arena.shape.layers):
        newest = row.newest(layer, tokens, end)
        arena.recent.reserve(left, arena.limit, *newest)
        # copies: places and what is left of a window may overlap
        parts += [
            (place, own.clone())
            for place, own in zip(arena.recent.slices(layer, index, 0, left), newest, strict=True)
        ]
    if arena.gates is not None and (scored := min(row.scored, end) - tokens) > 0:
        place = arena.recent.reserve_scores(left, arena.limit)[:, index, :, :scored]
        parts.append((place, row.scores(end)[:, :, tokens : tokens + scored].clone()))
    return parts


def _newcomers(row: Row, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Retention, position and flat head of the oldest ``tokens`` of the newest ones, (groups, N)."""
    pool, device = row.arena.pool, row.arena.device
    position = torch.arange(start, start + tokens, device=device).expand(pool.heads, -1)
    head = torch.arange(pool.heads, device=device)[:, None].expand(-1, tokens)
    groups = (pool.groups, -1)
    return row.retention(tokens).reshape(groups), position.reshape(groups), head.reshape(groups)


def _score(row: Row, slab: Slab, candidates: list[torch.Tensor], tokens: int) -> torch.Tensor:
    retention, position, head = candidates
    if row.config.policy == "learned":
        return retention_score(retention, position, row.seen, row.config.lookahead)
    if row.config.policy == "keydiff":
        layers = range(row.arena.shape.layers)
        new = torch.cat([row.newest(layer, 0, tokens)[0] for layer in layers])
        new = slab.pool.as_kept(new).reshape(slab.groups, -1, new.shape[-1])
        old = slab.pool.read(0, slab.rows(slab.keys))
        return keydiff_score(torch.cat([old, new], 1), head, slab.heads)
    return retention
