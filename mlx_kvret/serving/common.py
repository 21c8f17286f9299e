"""What serving does alike on every backend, with the rooms of each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.shares import Share
from ..core.snapshot import Snapshot
from .drawing import Drawer, Drawing


@dataclass(frozen=True)
class Rooms:
    """A backend's own: modules and functions of the same names and meanings.

    ``greedy`` takes the likeliest of log probabilities (1, V), ``alone`` draws for one row, ``of_first`` has
    all ranks take what the first one draws, or None for the likeliest; ``batches`` tells whether all layers
    of a cache can stand in a batch.
    """

    hooks: Any
    snapshots: Any
    make_cache: Callable[..., Any]
    competing: Callable[[Any], tuple[Any, list[int]]]
    vocabulary: Callable[[Any], int | None]
    generator: Callable[..., Any]
    alone: Callable[[Any], Any]
    of_first: Callable[[Any, Any], Any]
    greedy: Callable[[Any], Any]
    batches: Callable[[Any], bool]


class Common:
    """The half of :class:`.backend.Backend` that no array is needed for.

    Args:
        options: of every cache.
    """

    def __init__(self, rooms: Rooms, model: Any, options: dict[str, Any]) -> None:
        self.rooms, self.model, self._options = rooms, model, options
        first = self.new_cache(None)
        self.shape, self.layers = rooms.competing(model)
        attached = rooms.hooks.attachment(model)
        self.split: Share | None = None if attached is None else attached.layout.share
        self.ranks = None if self.split is None else self.split.ranks
        self.eviction, self.identity = first.shared.config, first.identity
        self.vocabulary, self.batches = rooms.vocabulary(model), rooms.batches(first)

    def new_cache(self, budget: int | None) -> Any:
        own = {} if budget is None else {"budget": budget}
        return self.rooms.make_cache(self.model, **(self._options | own))

    def copy(self, cache: Any) -> Any:
        # in arrays of its own, which go with it
        return copy.deepcopy(cache)

    def share(self, cache: Any, parent: Any) -> None:
        """As :meth:`.prefixes.Pools.share`.

        Both came of one sequence, one after the other: as long as no token went from the newest ones into
        the pool, that is the same. Caches at rest are copied from and never written to.
        """
        rows, arenas = zip(*((one.shared.rows[0], one.shared.arena) for one in (cache, parent)), strict=True)
        pooled, capacity, slabs = (
            {row.seen - row.length for row in rows},
            {arena.pool.capacity for arena in arenas},
            {arena.slabs.count for arena in arenas},
        )
        if len(pooled) == len(capacity) == 1 and slabs == {1}:
            arenas[0].pool = arenas[1].pool

    def pool(self, cache: Any) -> tuple[int, int]:
        """As :meth:`.prefixes.Pools.pool`."""
        pool = cache.shared.arena.pool
        return id(pool), int(pool.nbytes)

    def row(self, found: Any) -> Any:
        return found[0]

    def chooser(self, asked: Drawing) -> Any:
        return self.rooms.of_first(self.model, self._drawn(asked)) or self.rooms.greedy

    def _drawn(self, asked: Drawing) -> Any:
        """How this process draws; None for the likeliest."""
        if asked.greedy:
            return None
        if asked.plain:
            return self.rooms.alone(asked.sampling)
        draw = Drawer(asked)
        return lambda logprobs: self.array(draw(self.host(logprobs[0])))

    def host(self, logprobs: Any) -> Any:
        raise NotImplementedError

    def array(self, token: int) -> Any:
        raise NotImplementedError

    def generator(self, rows: int) -> Any:
        return self.rooms.generator(self.model, completion_batch_size=rows, prefill_batch_size=rows)

    def take(self, cache: Any) -> Snapshot:
        found: Snapshot = self.rooms.snapshots.take(cache, {})
        return found

    def reopen(self, snapshot: Snapshot) -> Any:
        return self.rooms.hooks.reopened_cache(self.model, snapshot)
