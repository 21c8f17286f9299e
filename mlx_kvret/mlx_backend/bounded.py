"""What the layers of one cache share: the pool, the clock and the rule by which entries go."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import mlx.core as mx
import numpy as np

from ..core.budget import CacheShape
from ..core.config import EvictionConfig
from ..core.eviction import heads_per_group
from ..core.passes import Passes
from ..core.schedule import Move, Schedule
from ..core.state import State
from ..core.types import Ints
from ..errors import CacheError, KVRetError
from .pool import Pool
from .recent import Recent
from .selection import keydiff_score, retention_score, select, static_score

if TYPE_CHECKING:
    from .gates import RetentionGates


class Bounded:
    """A cache of L competing layers that holds at most (M + B)·L·H entries between forward passes.

    A compaction that is due after a forward pass is carried out by :meth:`settle`, before the next one or as
    soon as anyone looks, whichever comes first. So tokens of the last pass can still be taken back, and a
    decoding loop never waits. How many entries there are is arithmetic, never read from the device.
    ``owner`` names the model and the gates, for caches saved to a file, ``identity`` the very weights too.

    Changes are decided upon first and then put in place, whole or not at all: those of a forward pass by
    :mod:`mlx_kvret.mlx_backend.forward`, all others by :meth:`put`.
    """

    def __init__(
        self,
        shape: CacheShape,
        config: EvictionConfig,
        owner: dict[str, str],
        gates: RetentionGates | None = None,
        gate_layers: Sequence[int] | None = None,
    ) -> None:
        self.shape, self.config, self.owner = shape, config, owner
        self.gates, self.gate_layers = gates, gate_layers
        self.size = heads_per_group(config, shape.layers, shape.kv_heads)
        self.pool = Pool(shape.heads // self.size, self.size)
        self.schedule = Schedule(config, self.pool.groups, self.size)
        self.recents = [self._recent(layer) for layer in range(shape.layers)]
        self.seen = [0] * shape.layers
        self.identity = ""
        self.passes = Passes()
        # of the pass under way: masks that were made for it, and by id of the keys whose they are
        self.masks: list[mx.array] = []
        self.fetchers: dict[int, Any] = {}
        self._decided: State | None = None
        self.evaluate()

    def _recent(self, layer: int) -> Recent:
        index = self.gate_layers[layer] if self.gate_layers else layer
        gate = partial(self.gates.log_beta, index) if self.gates is not None else None
        defer = self.shape.deferred(self.config.budget, self.config.buffer)
        return Recent(self.config.buffer, defer, gate)

    # ------------------------------------------------------------------ changes, whole or not at all

    def settle(self, wait: bool = False) -> None:
        """Carry out what is due after the last pass, or was broken off; ``wait`` until it is computed.

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
        if fresh := [log_beta for layer in self.recents for log_beta in layer.fresh()]:
            self._compute(fresh, wait)
        move = self.schedule.next(self.seen[0], self.recents[0].length)
        if move is None:
            return
        capacity = self.pool.capacity
        try:
            after = self._compacted(move)
        except (RuntimeError, MemoryError) as error:
            if self.passes.in_flight and not isinstance(error, KVRetError):
                self.lose(error)
            raise
        self.put(after)
        del after
        if self.pool.capacity > capacity:
            # one by one, so that no two of the old arrays stand beside their larger copies
            for array in self.pool.arrays():
                self._compute(array, wait=True)
        # nothing may hold on to what has been decided upon, whether or not anyone looks at the pool soon
        lookup = self.pool.lookup
        self._compute([*self.arrays(), lookup.table, lookup.offsets], wait)

    def release(self) -> None:
        """The pass is over: forget what served only it."""
        self.masks, self.fetchers = [], {}
        for recent in self.recents:
            recent.release()

    def put(self, state: State) -> None:
        """Put a change in place; if that is broken off, the next :meth:`settle` does it again."""
        self._decided = state
        state.put()
        self._decided = None

    def take_back(self, count: int, others: Sequence[Any] = ()) -> None:
        """Forget the newest ``count`` tokens of every layer, which no compaction has decided upon.

        ``others`` are entries of the same cache that do not compete.
        """
        changed = [*self.recents, *others]
        copies = [copy.copy(one) for one in changed]
        for one in copies:
            one.trim(count)
        after = [dict(vars(one)) for one in copies]
        seen = [seen - count for seen in self.seen]
        self.put(State([*zip(changed, after, strict=True), (self, {"seen": seen})]))

    def confirm(self) -> None:
        """Wait for what is in flight of the layers that compete.

        Raises:
            CacheError: it failed, so that the cache cannot go on.
        """
        if self.passes.in_flight:
            self._compute(self.arrays(), wait=True)

    def _compute(self, arrays: Any, wait: bool = False) -> None:
        self.passes.in_flight |= not wait
        try:
            (mx.eval if wait else mx.async_eval)(arrays)
        except Exception as error:
            self.lose(error)

    def lose(self, error: BaseException) -> NoReturn:
        """MLX failed at something that the cache holds."""
        reason = str(error).partition("\n")[0]
        self.passes.lose(f"MLX failed while it computed what the cache holds ({reason})")
        raise CacheError(self.passes.lost) from error

    def _compacted(self, move: Move) -> State:
        """The oldest tokens of the rectangle moved into the pool; groups that are due select first."""
        shape, tokens, due = self.shape, move.tokens, move.due
        start = self.seen[0] - self.recents[0].length
        retention = mx.stack([self._retention(layer, tokens, start) for layer in range(shape.layers)])
        pool, recents, schedule = (
            copy.copy(self.pool),
            list(map(copy.copy, self.recents)),
            copy.copy(self.schedule),
        )
        if move.capacity > pool.capacity:
            first, room = recents[0], max(move.capacity, 2 * pool.capacity)
            pool.grow(min(schedule.most, room), first.keys, first.values)
        rows = (pool.groups, -1)
        position = mx.broadcast_to(mx.arange(start, start + tokens, dtype=mx.int32), (shape.heads, tokens))
        head = mx.broadcast_to(mx.arange(shape.heads, dtype=mx.int32)[:, None], (shape.heads, tokens))
        new = retention.reshape(rows), position.reshape(rows), head.reshape(rows)

        old = pool.rows(pool.retention), pool.rows(pool.position), pool.rows(pool.owner)
        stays, survives = old[2] < shape.heads, mx.ones(new[2].shape, mx.bool_)
        if due.any():
            joined = [mx.concatenate([a, b], axis=1) for a, b in zip(old, new, strict=True)]
            keep = select(
                self._score(pool, joined, tokens),
                joined[1],
                joined[2],
                self.seen[0],
                self.config,
                self.size,
                shape.heads,
            )
            if not due.all():
                keep = mx.where(mx.array(due)[:, None], keep, joined[2] < shape.heads)
            stays, survives = keep[:, : stays.shape[1]], keep[:, stays.shape[1] :]
        slots = pool.destinations(stays, survives)
        pool.admit(stays, slots, survives, *new)
        by_layer = slots.reshape(shape.layers, -1)
        for layer, recent in enumerate(recents):
            keys, values = recent.keys[0, :, :tokens], recent.values[0, :, :tokens]
            pool.fill(by_layer[layer], keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1]))
            recent.forget_oldest(tokens)
        schedule.done(move, start, self._counted(pool))
        return State.becoming(
            [(self.pool, pool), (self.schedule, schedule), *zip(self.recents, recents, strict=True)]
        )

    def _counted(self, pool: Pool) -> Ints | None:
        """Entries per group where a threshold decides, read from the device; None where it is arithmetic."""
        if self.config.threshold is None:
            return None
        return np.diff(np.array(pool.lookup.offsets)[:: self.size])

    def _retention(self, layer: int, tokens: int, start: int) -> mx.array:
        """What is stored with the oldest ``tokens`` of a layer, (H, tokens) float32."""
        recent = self.recents[layer]
        if self.config.policy == "learned":
            return recent.log_beta()[:, :tokens]
        return static_score(
            self.config,
            recent.keys[0, :, :tokens],
            layer * self.shape.kv_heads,
            np.arange(start, start + tokens),
        )

    def _score(self, pool: Pool, candidates: list[mx.array], tokens: int) -> mx.array:
        retention, position, head = candidates
        if self.config.policy == "learned":
            return retention_score(retention, position, self.seen[0], self.config.lookahead)
        if self.config.policy == "keydiff":
            new = mx.stack([recent.keys[0, :, :tokens] for recent in self.recents])
            keys = mx.concatenate([pool.rows(pool.keys), new.reshape(pool.groups, -1, new.shape[-1])], axis=1)
            return keydiff_score(keys, head, self.shape.heads)
        return retention

    # ------------------------------------------------------------------ looking

    @property
    def entries(self) -> int:
        """Cached entries over all layers and heads."""
        self.settle()
        return self.unsettled_entries

    @property
    def unsettled_entries(self) -> int:
        """Entries before anything that is due is carried out."""
        self.passes.check()
        return int(self.schedule.counts.sum()) + self.recents[0].length * self.shape.heads

    def kept_positions(self) -> list[list[Ints]]:
        """For each layer, for each KV head, the sorted positions of its entries (int64 arrays)."""
        self.settle()
        self.confirm()
        table, offsets = np.array(self.pool.lookup.table), self.pool.lookup.on_host()
        position = np.array(self.pool.position)[table]
        recent = np.arange(self.seen[0] - self.recents[0].length, self.seen[0])
        heads: list[Ints] = [
            np.concatenate([np.sort(position[a:b]), recent]).astype(np.int64)
            for a, b in itertools.pairwise(offsets)
        ]
        return [heads[i : i + self.shape.kv_heads] for i in range(0, len(heads), self.shape.kv_heads)]

    def arrays(self) -> list[Any]:
        """Everything to be evaluated."""
        return [self.pool.arrays(), [recent.arrays() for recent in self.recents]]

    def evaluate(self) -> None:
        """Compute what was built, which another thread could not: MLX's streams are those of a thread."""
        mx.eval(self.arrays(), self.pool.lookup.table, self.pool.lookup.offsets)

    def layer_nbytes(self, layer: int) -> int:
        """Bytes of one layer's rectangle and its share of the pool; the shares add up to all of it."""
        share, rest = divmod(self.pool.nbytes, self.shape.layers)
        own = sum(a.nbytes for a in self.recents[layer].arrays())
        return own + share + (rest if layer == 0 else 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bounded:
        """A cache of its own that shares gates and configuration, which never change."""
        self.settle()
        self.confirm()
        twin = Bounded(self.shape, self.config, self.owner, self.gates, self.gate_layers)
        memo[id(self)] = twin
        twin.identity = self.identity
        twin.pool = copy.deepcopy(self.pool, memo)
        twin.schedule, twin.seen = copy.deepcopy(self.schedule, memo), list(self.seen)
        for recent, theirs in zip(twin.recents, self.recents, strict=True):
            if theirs.length:
                learned = self.config.policy == "learned"
                recent.restore(
                    mx.array(theirs.keys), mx.array(theirs.values), theirs.log_beta() if learned else None
                )
        twin.evaluate()
        return twin
