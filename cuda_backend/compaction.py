"""What a compaction of sequences does, decided upon before anything changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mlx_kvret.core.config import MOST_TOKENS
from mlx_kvret.core.schedule import Move
from mlx_kvret.core.state import State
from mlx_kvret.core.types import Mask

from . import digits
from .kernels.dispatch import fill, select
from .pool import Slab
from .row import Row
from .selection import keydiff_score, retention_score, select_split

# entries that select together; each takes some 60 bytes meanwhile
TOGETHER = 1 << 22
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


def settle(rows: Sequence[Row]) -> None:
    """Carry out what is due of rows of one arena; those that are due together select together."""
    due: list[tuple[Row, Move]] = []
    for row in rows:
        move = row.schedule.next(row.seen, row.length)
        if move is not None:
            row.own()
            due.append((row, move))
        elif row.chunk is not None and row.length <= row.arena.limit:
            row.own()
            row.arena.put(Fold(row))
    if not due:
        return
    pool, (first, _) = due[0][0].arena.pool, due[0]
    needed = max(move.capacity for _, move in due)
    if needed > pool.capacity:
        most = max(row.schedule.most for row, _ in due)
        pool.grow(max(min(most, max(needed, 2 * pool.capacity)), needed), *first.newest(0, 0, 1))
    alike: dict[Any, list[tuple[Row, Move]]] = {}
    for row, move in due:
        rule = dataclasses.replace(row.config, budget=MOST_TOKENS, buffer=0)
        alike.setdefault((move.tokens, bool(move.due.any()), rule), []).append((row, move))
    for same in alike.values():
        entries = (pool.capacity + same[0][1].tokens) * pool.heads
        # several ranks, whose pools differ, must all ask of the same row
        most = max(1, TOGETHER // entries) if first.arena.share is None else 1
        for start in range(0, len(same), most):
            _compact(same[start : start + most])


def _compact(due: Sequence[tuple[Row, Move]]) -> None:
    """The oldest of the newest tokens moved into the pool; groups that are due select first.

    All of these rows move as many tokens by the same rule, but for their budgets.
    """
    arena, tokens = due[0][0].arena, due[0][1].tokens
    new = [_newcomers(row, row.seen - row.length, tokens) for row, _ in due]
    joined = []
    for (row, _), own in zip(due, new, strict=True):
        slab = row.slab
        old = slab.rows(slab.retention), slab.rows(slab.position), slab.rows(slab.owner)
        joined.append([torch.cat(pair, 1) for pair in zip(old, own, strict=True)])
    keeps = _chosen(due, joined) if due[0][1].due.any() else []
    for at, ((row, move), own) in enumerate(zip(due, new, strict=True)):
        alive = joined[at][2] < arena.pool.heads
        keep = alive
        if keeps:
            own_due = _own_due(row, move)
            mask = torch.from_numpy(own_due).to(arena.device, non_blocking=True)[:, None]
            keep = keeps[at] if own_due.all() else torch.where(mask, keeps[at], alive)
        arena.put(_compacted(row, move, own, keep))


def _chosen(due: Sequence[tuple[Row, Move]], joined: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Which of each row's candidates (retention, position and head) stay, as a mask (groups, C + N)."""
    arena, tokens, config = due[0][0].arena, due[0][1].tokens, due[0][0].config
    scores = [_score(row, row.slab, own, tokens) for (row, _), own in zip(due, joined, strict=True)]
    if arena.share is not None:
        ((row, move),), ((_, position, head),) = due, joined
        own_due = _own_due(row, move)
        given = scores[0], position, head, row.seen, config, arena.share, own_due, row.pictures
        return [digits.select(*given)]
    if config.scope == "modality":
        split = zip(due, scores, joined, strict=True)
        return [
            select_split(score, own[1], own[2], row.seen, row.config, arena.pool.heads, row.pictures)
            for (row, _), score, own in split
        ]
    position, head = (torch.cat([own[which] for own in joined]) for which in (1, 2))
    numbers = torch.tensor([[row.seen, row.config.budget] for row, _ in due])
    numbers = numbers.to(arena.device, non_blocking=True).repeat_interleave(arena.pool.groups, 0)
    keep = select(
        torch.cat(scores),
        position,
        head,
        numbers[:, :1],
        config,
        arena.size,
        arena.pool.heads,
        numbers[:, 1:],
    )
    return list(keep.split(arena.pool.groups))


def _compacted(row: Row, move: Move, new: tuple[torch.Tensor, ...], keep: torch.Tensor) -> Compaction:
    """What becomes of a row once ``keep`` (groups, C + N) of its entries and newcomers stay."""
    share, tokens, capacity = row.arena.share, move.tokens, keep.shape[1] - new[0].shape[1]
    stays, survives = keep[:, :capacity], keep[:, capacity:]
    if share is not None:
        stays = _with_room(row, stays, survives)
    slab = row.slab
    slots = slab.destinations(stays, survives)
    arrays = slab.admitted(stays, slots, survives, *new)
    counts = None
    if row.config.threshold is not None:
        counts = np.diff(arrays["offsets"].cpu().numpy()[:: row.arena.size])
        counts = counts if share is None else share.totals(counts, row.config)
    schedule = copy.copy(row.schedule)
    schedule.done(move, row.seen - row.length, counts)
    left = row.length - tokens
    scored = left if row.arena.gates is not None else 0
    after = State([(row, {"schedule": schedule, "length": left, "scored": scored, "chunk": None})])
    return Compaction(row, _moves(row, slots, survives, tokens), arrays, _remaining(row, tokens), after)


def _own_due(row: Row, move: Move) -> Mask:
    """Which of this rank's groups select."""
    share = row.arena.share
    return move.due if share is None else move.due[share.groups(row.config)]


def _with_room(row: Row, stays: torch.Tensor, survives: torch.Tensor) -> torch.Tensor:
    """``stays`` once the pool has room for a rank's entries, of which there may be more than its mean."""
    pool, before = row.arena.pool, row.arena.pool.capacity
    need = -(-int((stays.sum(1) + survives.sum(1)).max()) // pool.size)
    if need <= before:
        return stays
    pool.grow(need + need // 8, *row.newest(0, 0, 1))
    return F.pad(stays, ((pool.capacity - before) * pool.size, 0))


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
