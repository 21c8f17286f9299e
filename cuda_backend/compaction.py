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
from mlx_kvret.core.schedule import Move, grown, together
from mlx_kvret.core.shares import own_due
from mlx_kvret.core.state import State
from mlx_kvret.core.types import Ints

from . import digits
from .kernels.dispatch import fill, select
from .row import Row, run_gates
from .selection import keydiff_score, retention_score, select_split

Part = tuple[torch.Tensor, torch.Tensor]
Due = Sequence[tuple[Row, Move]]


class Compaction:
    """Moves and accounts of rows; done twice, because it was broken off, it comes to the same.

    ``moves`` are slots, survivors, keys and values (n, H, N, D); ``arrays`` as of :meth:`Pool.admitted`;
    ``rest`` what goes to the beginning of windows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        moves: list[tuple[torch.Tensor, ...]],
        arrays: dict[str, torch.Tensor],
        rest: list[Part],
        after: State,
    ) -> None:
        self._pool, self._slabs = rows[0].arena.pool, [row.hold.index for row in rows]
        self._moves, self._arrays, self._rest, self._after = moves, arrays, rest, after

    def put(self) -> None:
        """Move keys and values, then the accounts."""
        for slots, survives, keys, values in self._moves:
            fill(self._pool, slots, survives, keys, values)
        self._pool.take(self._arrays, self._slabs)
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
        pool.grow(grown(needed, pool.capacity, most), *first.newest(0, 0, 1))
    alike: dict[Any, list[tuple[Row, Move]]] = {}
    for row, move in due:
        rule = dataclasses.replace(row.config, budget=MOST_TOKENS, buffer=0)
        alike.setdefault((move.tokens, bool(move.due.any()), rule), []).append((row, move))
    for same in alike.values():
        entries = (pool.capacity + same[0][1].tokens) * pool.heads
        most = together(entries, first.arena.share is not None)
        for start in range(0, len(same), most):
            _compact(same[start : start + most])


def _compact(due: Due) -> None:
    """The oldest of the newest tokens moved into the pool; groups that are due select first.

    All of these rows move as many tokens by the same rule, but for their budgets.
    """
    rows, tokens = [row for row, _ in due], due[0][1].tokens
    arena, pool = rows[0].arena, rows[0].arena.pool
    slabs, capacity = [row.hold.index for row in rows], pool.capacity * pool.size
    new = _newcomers(rows, tokens)
    old = (pool.groups_of(pool.of(a, slabs)) for a in (pool.retention, pool.position, pool.owner))
    joined = [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
    keep = joined[2] < pool.heads
    if due[0][1].due.any():
        selects = np.concatenate([own_due(arena.share, move.due, row.config) for row, move in due])
        chosen = _chosen(due, joined)
        mask = torch.from_numpy(selects).to(arena.device, non_blocking=True)[:, None]
        keep = chosen if selects.all() else torch.where(mask, chosen, keep)
    stays, survives = keep[:, :capacity], keep[:, capacity:]
    if arena.share is not None:
        stays = _with_room(rows[0], stays, survives)
    slots = pool.destinations(stays, survives, slabs)
    arrays = pool.admitted(stays, slots, survives, *new, slabs)
    counts = _counts(rows, arrays["offsets"])
    after = State((row, _after(row, move, own)) for (row, move), own in zip(due, counts, strict=True))
    rest = [part for row in rows for part in _remaining(row, tokens)]
    arena.put(Compaction(rows, _moves(rows, slots, survives, tokens), arrays, rest, after))


def _chosen(due: Due, joined: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which candidates (retention, position and head) of all rows stay, as a mask (R·groups, C + N)."""
    (retention, position, head), (first, move) = joined, due[0]
    arena, config, tokens = first.arena, first.config, move.tokens
    pool, seen = arena.pool, [row.seen for row, _ in due]
    numbers = torch.tensor([seen, [row.config.budget for row, _ in due]])
    clock, budget = numbers.to(arena.device, non_blocking=True).repeat_interleave(pool.groups, 1)[..., None]
    score = retention
    if config.policy == "learned":
        score = retention_score(retention, position, clock, config.lookahead)
    if config.policy == "keydiff":
        heads_of = zip(due, head.split(pool.groups), strict=True)
        score = torch.cat([_keydiff(row, own, tokens) for (row, _), own in heads_of])
    if arena.share is not None:
        selects = own_due(arena.share, move.due, config)
        return digits.select(score, position, head, first.seen, config, arena.share, selects, first.pictures)
    if config.scope == "modality":
        split = zip(due, *(a.split(pool.groups) for a in (score, position, head)), strict=True)
        return torch.cat(
            [
                select_split(mine, place, own, row.seen, row.config, pool.heads, row.pictures)
                for (row, _), mine, place, own in split
            ]
        )
    return select(score, position, head, clock, config, arena.size, pool.heads, budget)


def _counts(rows: Sequence[Row], offsets: torch.Tensor) -> Sequence[Ints | None]:
    """Entries of each row's groups, by where its heads' are listed (R, heads + 1), if a threshold asks."""
    arena, config = rows[0].arena, rows[0].config
    if config.threshold is None:
        return [None] * len(rows)
    counts = np.diff(offsets.cpu().numpy()[:, :: arena.size])
    return [own if arena.share is None else arena.share.totals(own, config) for own in counts]


def _after(row: Row, move: Move, counts: Ints | None) -> dict[str, Any]:
    """What becomes of a row whose groups now have so many entries."""
    schedule = copy.copy(row.schedule)
    schedule.done(move, row.seen - row.length, counts)
    left = row.length - move.tokens
    scored = left if row.arena.gates is not None else 0
    return {"schedule": schedule, "length": left, "scored": scored, "chunk": None}


def _with_room(row: Row, stays: torch.Tensor, survives: torch.Tensor) -> torch.Tensor:
    """``stays`` once the pool has room for a rank's entries, of which there may be more than its mean."""
    pool, before = row.arena.pool, row.arena.pool.capacity
    need = -(-int((stays.sum(1) + survives.sum(1)).max()) // pool.size)
    if need <= before:
        return stays
    pool.grow(need + need // 8, *row.newest(0, 0, 1))
    return F.pad(stays, ((pool.capacity - before) * pool.size, 0))


def _moves(
    rows: Sequence[Row], slots: torch.Tensor, survives: torch.Tensor, tokens: int
) -> list[tuple[torch.Tensor, ...]]:
    """Slots, survivors, keys and values; of all layers and rows at once where they stand in one array."""
    recent, layers = rows[0].arena.recent, rows[0].arena.shape.layers
    by_layer = [
        a.reshape(len(rows), layers, -1).transpose(0, 1).reshape(layers, -1) for a in (slots, survives)
    ]
    if all(row.chunk is None for row in rows):
        assert recent.keys is not None and recent.values is not None
        first = rows[0].hold.index
        which: Any = slice(first, first + 1)
        if len(rows) > 1:
            which = torch.tensor([row.hold.index for row in rows]).to(slots.device, non_blocking=True)
        held = (a[:, which, :, :tokens] for a in (recent.keys, recent.values))
        return [(*(a.flatten() for a in by_layer), *(a.flatten(0, 1) for a in held))]
    found = []
    for layer in range(layers):
        newest = zip(*(row.newest(layer, 0, tokens) for row in rows), strict=True)
        found.append((*(a[layer] for a in by_layer), *(torch.cat(side) for side in newest)))
    return found


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


def _newcomers(rows: Sequence[Row], tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Retention, position and flat head of the oldest ``tokens`` of rows' newest ones, (R·groups, N)."""
    pool, device = rows[0].arena.pool, rows[0].arena.device
    if rows[0].config.policy == "learned":
        run_gates(rows)
    retention = torch.stack([row.retention(tokens) for row in rows])
    start = torch.tensor([row.seen - row.length for row in rows]).to(device, non_blocking=True)
    shape = len(rows), pool.heads, tokens
    position = (start[:, None] + torch.arange(tokens, device=device))[:, None].expand(shape)
    head = torch.arange(pool.heads, device=device)[:, None].expand(shape)
    groups = (len(rows) * pool.groups, -1)
    return retention.reshape(groups), position.reshape(groups), head.reshape(groups)


def _keydiff(row: Row, head: torch.Tensor, tokens: int) -> torch.Tensor:
    """How much each key of a row is like the mean of its head; ``head`` (groups, C + N)."""
    slab, layers = row.slab, range(row.arena.shape.layers)
    new = torch.cat([row.newest(layer, 0, tokens)[0] for layer in layers])
    new = slab.pool.as_kept(new).reshape(slab.groups, -1, new.shape[-1])
    old = slab.pool.read(0, slab.rows(slab.keys))
    return keydiff_score(torch.cat([old, new], 1), head, slab.heads)
