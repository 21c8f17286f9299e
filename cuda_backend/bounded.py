"""What the layers of one cache share: the pool, the clock and the rule by which entries go."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import heads_per_group
from mlx_kvret.core.passes import Passes
from mlx_kvret.core.schedule import Move, Schedule
from mlx_kvret.core.state import State
from mlx_kvret.core.types import Ints
from mlx_kvret.errors import CacheError, UnsupportedFeatureError

from .gates import RetentionGates
from .kernels.dispatch import fill, select
from .modes import ordinary
from .pool import Pool
from .recent import Recent
from .selection import keydiff_score, retention_score, static_score


@dataclass
class Static:
    """Where a step of fixed shapes finds its numbers on the device.

    ``length`` (1,) int32 places of the rectangles in use before the step and ``after`` (1,) after it;
    ``waiting`` (1,) int64 is where the token's gate input goes in ``inputs``, per layer (R, g, hidden).
    """

    length: torch.Tensor
    after: torch.Tensor
    waiting: torch.Tensor
    inputs: list[torch.Tensor]


@dataclass
class Compaction:
    """What a compaction does, decided upon; done twice, because it was broken off, it comes to the same.

    ``moves`` are slots, survivors, keys and values of each layer, ``arrays`` as of :meth:`Pool.admitted`.
    """

    pool: Pool
    moves: Sequence[tuple[torch.Tensor, ...]]
    arrays: dict[str, torch.Tensor]
    after: State

    def put(self) -> None:
        """Move keys and values, then the accounts."""
        for slots, survives, keys, values in self.moves:
            fill(self.pool, slots, survives, keys, values)
        self.pool.take(self.arrays)
        self.after.put()


class Bounded:
    """A cache of L competing layers that holds at most (M + B)·L·H entries per sequence between passes.

    A compaction that is due after a forward pass is carried out by :meth:`settle`, before the next one or as
    soon as anyone looks, whichever comes first. So tokens of the last pass can still be taken back, and a
    decoding loop never waits. How many entries there are is arithmetic, never read from the device.
    ``owner`` names the model and the gates, for caches saved to a file, ``identity`` the very weights too.

    Changes are decided upon first and then put in place, whole or not at all: those of a forward pass by
    :mod:`cuda_backend.forward`, all others by :meth:`put`.

    Sequences of a batch stand right-aligned: ``padding`` (R,) places come before a sequence's first token.
    Positions count from there, so that a row is treated as it would be alone.
    """

    rows: int
    pool: Pool
    schedule: Schedule
    padding: torch.Tensor

    def __init__(
        self,
        shape: CacheShape,
        config: EvictionConfig,
        owner: dict[str, str],
        device: torch.device,
        gates: RetentionGates | None = None,
        gate_layers: Sequence[int] | None = None,
    ) -> None:
        self.shape, self.config, self.owner, self.device = shape, config, owner, device
        self.gates, self.gate_layers = gates, tuple(gate_layers or range(shape.layers))
        self._defer = shape.deferred(config.budget, config.buffer)
        self.size = heads_per_group(config, shape.layers, shape.kv_heads)
        self.recents = [self._recent(layer) for layer in range(shape.layers)]
        self.seen = [0] * shape.layers
        self.static: Static | None = None
        self.identity = ""
        self.passes = Passes()
        self._decided: State | Compaction | None = None
        self._batch(1)

    def _recent(self, layer: int) -> Recent:
        gate = partial(self.gates.log_beta, self.gate_layers[layer]) if self.gates is not None else None
        return Recent(self.config.buffer, self._defer, gate)

    def _batch(self, rows: int) -> None:
        groups = self.shape.heads // self.size
        vars(self).update(
            rows=rows,
            pool=Pool(rows * groups, self.size, self.device),
            schedule=Schedule(self.config, groups, self.size, rows),
            padding=torch.zeros(rows, dtype=torch.int64, device=self.device),
        )

    # ------------------------------------------------------------------ a forward pass

    @ordinary
    def begin(self, rows: int, mask: torch.Tensor | None) -> None:
        """A forward pass of ``rows`` sequences comes; ``mask`` (R, at least seen + T) is False where padded.

        Raises:
            UnsupportedFeatureError: another number of sequences than before, or padding not on the left.
        """
        if rows != self.rows:
            if self.seen[0]:
                raise UnsupportedFeatureError(
                    f"a batch of {rows} sequences came to a cache that holds {self.rows}; make a new cache"
                )
            self._batch(rows)
        if not self.passes.under_way:
            self.settle()
        if mask is None:
            return
        unread = (self.schedule.padding >= self.seen[0]).any()
        if unread or mask.shape[1] > self.seen[0] + 1 or self.device.type == "cpu":
            self._pad(mask.bool())
        else:
            # a decoding step must not wait for the device
            torch._assert_async(mask[:, -1].all(), "a sequence of the batch is padded after its first token")

    def _pad(self, mask: torch.Tensor) -> None:
        padding = (~mask).sum(1)
        ragged = (mask[:, 1:] < mask[:, :-1]).any()
        known = torch.stack([*padding, ragged.long()]).cpu().numpy()
        past = np.minimum(known[:-1], self.seen[0]) != np.minimum(self.schedule.padding, self.seen[0])
        if known[-1] or past.any():
            raise UnsupportedFeatureError(
                "the attention mask hides tokens other than those before a sequence's first one; pad on the "
                "left (tokenizer.padding_side = 'left') and keep a mask as it was for tokens already read"
            )
        self.padding, self.schedule.padding = padding, known[:-1]

    def before(self) -> State:
        """What undoes a forward pass."""
        accounts = {name: vars(self)[name] for name in ("rows", "pool", "schedule", "padding")}
        held = [(recent, vars(recent).copy()) for recent in self.recents]
        shared = (self, accounts | {"seen": list(self.seen)})
        return State([shared, (self.schedule, vars(self.schedule).copy()), *held])

    @ordinary
    def put(self, change: State | Compaction) -> None:
        """Put a change in place; if that is broken off, the next :meth:`settle` does it again."""
        self._decided = change
        change.put()
        self._decided = None

    def take_back(self, count: int, layers: Sequence[int] | None = None) -> None:
        """Forget the newest ``count`` tokens of the layers, all unless given, which no compaction was of."""
        which = range(len(self.recents)) if layers is None else layers
        copies = {layer: copy.copy(self.recents[layer]) for layer in which}
        for recent in copies.values():
            recent.cut(recent.length - count)
        seen = [seen - count * (layer in copies) for layer, seen in enumerate(self.seen)]
        pairs = [(self.recents[layer], vars(recent)) for layer, recent in copies.items()]
        self.put(State([*pairs, (self, {"seen": seen})]))

    @ordinary
    def settle(self) -> None:
        """Carry out what is due after the last forward pass, or was broken off.

        Raises:
            CacheError: a pass is under way, or the cache cannot go on.
        """
        self.passes.check()
        if self._decided is not None:
            self.put(self._decided)
        if len(set(self.seen)) != 1:
            raise CacheError(
                f"the layers have seen {min(self.seen)} to {max(self.seen)} tokens: taking tokens back was "
                "broken off half way; make a new cache"
            )
        if max(recent.waiting for recent in self.recents) >= self._defer:
            self._run_gates()
        move = self.schedule.next(self.seen[0], self.recents[0].length)
        if move is not None:
            self.put(self._compacted(move))

    def _run_gates(self) -> None:
        """Score all gate inputs that wait; in one go where every layer has as many of them."""
        waiting = {recent.waiting for recent in self.recents}
        if self.gates is not None and len(waiting) == 1 and self.gates.stacked == self.gate_layers:
            if waiting != {0}:
                log_beta = self.gates.log_betas(torch.stack([recent.inputs() for recent in self.recents]))
                for recent, own in zip(self.recents, log_beta, strict=True):
                    recent.scored(own)
            return
        # an interrupt may have come between
        for recent in self.recents:
            recent.run_gate()

    def _compacted(self, move: Move) -> Compaction:
        """The oldest tokens of the rectangle moved into the pool; groups that are due select first."""
        pool, heads, tokens = self.pool, self.pool.heads, move.tokens
        start = self.seen[0] - self.recents[0].length
        if move.capacity > pool.capacity:
            first = self.recents[0]
            capacity = min(self.schedule.most, max(move.capacity, 2 * pool.capacity))
            pool.grow(max(capacity, move.capacity), first.keys, first.values)
        new = self._newcomers(start, tokens)
        old = pool.rows(pool.retention), pool.rows(pool.position), pool.rows(pool.owner)
        stays, survives = old[2] < heads, new[2] < heads
        if move.due.any():
            joined = [torch.cat([a, b], 1) for a, b in zip(old, new, strict=True)]
            seen = (self.seen[0] - self.padding).repeat_interleave(pool.groups // self.rows)[:, None]
            score = self._score(joined, tokens, seen)
            keep = select(score, joined[1], joined[2], seen, self.config, self.size, heads)
            if not move.due.all():
                due = torch.from_numpy(move.due).to(self.device, non_blocking=True)[:, None]
                keep = torch.where(due, keep, joined[2] < heads)
            stays, survives = keep[:, : stays.shape[1]], keep[:, stays.shape[1] :]
        slots = pool.destinations(stays, survives)
        arrays = pool.admitted(stays, slots, survives, *new)
        slots, survives = (a.reshape(self.rows, self.shape.layers, -1) for a in (slots, survives))
        recents, schedule, moves = list(map(copy.copy, self.recents)), copy.copy(self.schedule), []
        for layer, recent in enumerate(recents):
            keys, values = recent.keys[:, :, :tokens], recent.values[:, :, :tokens]
            moves.append((slots[:, layer].flatten(), survives[:, layer].flatten(), keys, values))
            recent.forget_oldest(tokens)
        counts = None
        if self.config.threshold is not None:
            counts = np.diff(arrays["offsets"].cpu().numpy()[:: self.size])
        schedule.done(move, start, counts)
        after = State.becoming([(self.schedule, schedule), *zip(self.recents, recents, strict=True)])
        return Compaction(pool, moves, arrays, after)

    def _newcomers(self, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Retention, position and flat head of the oldest ``tokens`` of the rectangle, (groups, N)."""
        rows, layers = self.rows, self.shape.layers
        position = self._positions(start, tokens)
        head = torch.arange(self.pool.heads, device=self.device).view(rows, -1, 1)
        # padding is no entry
        head = torch.where(position[:, None] >= 0, head, self.pool.heads)
        retention = torch.stack([self.retention_of(layer, tokens, start) for layer in range(layers)], 1)
        groups = (self.pool.groups, -1)
        return (
            retention.reshape(groups),
            position[:, None].expand(head.shape).reshape(groups),
            head.reshape(groups),
        )

    def _positions(self, start: int, tokens: int) -> torch.Tensor:
        """Positions (R, tokens) of the places from ``start`` on, below 0 for padding."""
        return torch.arange(start, start + tokens, device=self.device) - self.padding[:, None]

    @ordinary
    def retention_of(self, layer: int, tokens: int, start: int) -> torch.Tensor:
        """What is stored with the oldest ``tokens`` of a layer, from place ``start`` on, (R, H, tokens)."""
        recent = self.recents[layer]
        if self.config.policy == "learned":
            self._run_gates()
            return recent.log_beta()[:, :, :tokens]
        first = layer * self.shape.kv_heads
        head = torch.arange(first, first + self.shape.kv_heads, device=self.device)
        return static_score(self.config, recent.keys[:, :, :tokens], head, self._positions(start, tokens))

    def _score(self, candidates: list[torch.Tensor], tokens: int, seen: torch.Tensor) -> torch.Tensor:
        retention, position, head = candidates
        if self.config.policy == "learned":
            return retention_score(retention, position, seen, self.config.lookahead)
        if self.config.policy == "keydiff":
            new = torch.stack([recent.keys[:, :, :tokens] for recent in self.recents], 1)
            new = new.reshape(self.pool.groups, -1, new.shape[-1])
            keys = torch.cat([self.pool.rows(self.pool.keys), new], 1)
            return keydiff_score(keys, head, self.pool.heads)
        return retention

    # ------------------------------------------------------------------ looking

    @property
    def entries(self) -> int:
        """Cached entries over all sequences, layers and heads."""
        self.settle()
        start = self.seen[0] - self.recents[0].length
        recent = self.schedule.tokens(start, self.seen[0]).sum() * self.shape.heads
        return int(self.schedule.counts.sum() + recent)

    def kept_positions(self, row: int = 0) -> list[list[Ints]]:
        """For each layer, for each KV head, the sorted positions of a sequence's entries (int64 arrays)."""
        self.settle()
        table, offsets = self.pool.lookup.table.cpu().numpy(), self.pool.lookup.on_host()
        position = self.pool.position.cpu().numpy()[table]
        seen = self.seen[0] - int(self.schedule.padding[row])
        recent = np.arange(max(0, seen - self.recents[0].length), seen)
        own = offsets[row * self.shape.heads : (row + 1) * self.shape.heads + 1]
        heads: list[Ints] = [
            np.concatenate([np.sort(position[a:b]), recent]).astype(np.int64)
            for a, b in itertools.pairwise(own)
        ]
        return [heads[i : i + self.shape.kv_heads] for i in range(0, len(heads), self.shape.kv_heads)]

    @property
    def nbytes(self) -> int:
        """Bytes of the pool and the rectangles."""
        self.settle()
        return self.pool.nbytes + sum(a.nbytes for recent in self.recents for a in recent.arrays())

    @ordinary
    def __deepcopy__(self, memo: dict[int, Any]) -> Bounded:
        """A cache of its own that shares gates and configuration, which never change."""
        self.settle()
        twin = Bounded(self.shape, self.config, self.owner, self.device, self.gates, self.gate_layers)
        memo[id(self)] = twin
        twin.identity = self.identity
        twin.rows, twin.padding, twin.pool = self.rows, self.padding, self.pool.copy()
        twin.schedule, twin.seen = copy.deepcopy(self.schedule), list(self.seen)
        for recent, theirs in zip(twin.recents, self.recents, strict=True):
            if theirs.length:
                learned = self.config.policy == "learned"
                log_beta = theirs.log_beta() if learned else None
                recent.restore(theirs.keys.clone(), theirs.values.clone(), log_beta)
        return twin
