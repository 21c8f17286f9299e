"""What the layers of one cache share: its rows, each with a clock and a budget, in an arena."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..core.budget import CacheShape
from ..core.config import EvictionConfig
from ..core.passes import Passes
from ..core.pictures import forgotten
from ..core.shares import Share, by_layer
from ..core.state import State
from ..core.types import Ints
from ..errors import CacheError, ConfigError, KVRetError
from .arena import Arena
from .compaction import compacted, folded
from .joining import admit, alone, new_row, own
from .reading import Reading
from .row import Row

if TYPE_CHECKING:
    from .gates import RetentionGates


class Bounded:
    """Rows of one arena, each of which holds at most (M + B)·L·H entries between forward passes.

    A compaction that is due after a forward pass is carried out by :meth:`settle`, before the next one or as
    soon as anyone looks, whichever comes first. So tokens of the last pass can still be taken back, and a
    decoding loop never waits. How many entries there are is arithmetic, never read from the device.

    A ``batch`` may have any number of rows, else there is one. ``reading`` is the pass under way; ``to_come``
    tokens of each row are real in the passes to come, if some rows have fewer than others.
    """

    def __init__(self, arena: Arena, rows: Sequence[Row], batch: bool = False) -> None:
        self.arena, self.rows, self.batch = arena, list(rows), batch
        self.reading: Reading | None = None
        # what mlx-lm has asked the first layer for, until it has asked the others: see batch.py
        self.made: tuple[Any, Callable[[], Bounded | None]] = (None, lambda: None)
        self.to_come: list[int] | None = None

    @classmethod
    def single(
        cls,
        shape: CacheShape,
        config: EvictionConfig,
        owner: dict[str, str],
        gates: RetentionGates | None = None,
        gate_layers: Sequence[int] | None = None,
        share: Share | None = None,
    ) -> Bounded:
        """An empty sequence in an arena of its own."""
        arena = Arena(shape, config, owner, gates, gate_layers, share=share)
        arena.evaluate()
        return cls(arena, [new_row(arena)])

    @property
    def shape(self) -> CacheShape:
        return self.arena.shape

    @property
    def owner(self) -> dict[str, str]:
        return self.arena.owner

    @property
    def passes(self) -> Passes:
        return self.arena.passes

    @property
    def identity(self) -> str:
        return self.arena.identity

    @property
    def row(self) -> Row:
        """The only row.

        Raises:
            CacheError: there are several.
        """
        if len(self.rows) != 1:
            raise CacheError(
                f"the cache is a batch of {len(self.rows)} rows; take one of them with cache.row(i)"
            )
        return self.rows[0]

    @property
    def config(self) -> EvictionConfig:
        """The only row's."""
        return self.row.config

    @property
    def seen(self) -> int:
        """Tokens that the only row has seen."""
        return self.row.seen

    # ------------------------------------------------------------------ rows

    def extend(self, other: Bounded) -> None:
        """The rows of another come after these and leave it; what is in another arena is copied.

        Raises as :func:`.joining.admit`.
        """
        if other is self:
            raise ConfigError("a cache cannot be extended by itself; give a copy")
        self.settle()
        other.settle()
        rows = [*self.rows, *admit(self.arena, other.rows)]
        self.arena.put(State([(self, {"rows": rows, "batch": True}), (other, {"rows": [], "batch": True})]))
        self.arena.tidy()

    def filter(self, keep: Sequence[int]) -> None:
        """Keep these rows, in this order; the others end.

        Raises:
            ConfigError: there is no such row.
        """
        self.arena.check()
        if bad := [index for index in keep if not 0 <= index < len(self.rows)]:
            raise ConfigError(f"row {bad[0]} is not one of the cache's {len(self.rows)}; count from 0")
        kept = {"rows": [self.rows[int(index)] for index in keep], "batch": True}
        self.arena.put(State([(self, kept)]))
        self.arena.tidy()

    def copy(self) -> Bounded:
        """The same rows, which share their slabs until either is written to."""
        self.settle()
        made = Bounded(self.arena, [row.twin() for row in self.rows], self.batch)
        made.to_come = self.to_come
        return made

    def extract(self, index: int) -> Bounded:
        """A single sequence that goes on where a row is, and shares its slab until either is written to."""
        self.settle()
        return Bounded(self.arena, [self.rows[index].twin()])

    @classmethod
    def merged(cls, parts: Sequence[Bounded]) -> Bounded:
        """A batch of copies of all rows, in an arena that has one already, or a new one.

        Raises as :func:`.joining.admit`.
        """
        for part in parts:
            part.settle()
        first = parts[0].arena
        shared = [part.arena for part in parts if part.arena.slabs.count > 1]
        rows = [row for part in parts for row in part.rows]
        arena = shared[0] if shared else first.like(len(rows))
        return cls(arena, admit(arena, [row.twin() for row in rows]), batch=True)

    # ------------------------------------------------------------------ passes

    def expect(self, lengths: list[int] | None) -> None:
        """So many tokens of each row are real in the passes to come; None if all are."""
        if lengths is not None and len(lengths) != len(self.rows):
            raise CacheError(f"{len(lengths)} lengths for {len(self.rows)} rows; give one for each row")
        self.to_come = lengths

    def counts(self, tokens: int) -> list[int]:
        """How many of the next ``tokens`` are real, of each row."""
        if self.to_come is None:
            return [tokens] * len(self.rows)
        return [max(0, min(left, tokens)) for left in self.to_come]

    def prepare(self, tokens: int, wait: bool = False) -> None:
        """Have everything decided that a pass of so many tokens builds upon."""
        self.settle(wait)
        own(self.arena, (row for row, n in zip(self.rows, self.counts(tokens), strict=True) if n))

    def begin(self, tokens: int) -> tuple[Reading, State]:
        """A pass of so many tokens, to be put in ``reading``, and what undoes it."""
        reading = Reading(self.arena, self.rows, self.counts(tokens), tokens)
        return reading, State([*reading.before(), (self, {"reading": None, "to_come": self.to_come})])

    def finish(self) -> None:
        """The pass is over: its tokens count."""
        reading = self.reading
        assert reading is not None
        left = self.to_come and [count - reading.tokens for count in self.to_come]
        State.all([reading.after(), State([(self, {"reading": None, "to_come": left})])]).put()

    def offsets(self, layer: int) -> mx.array:
        """Tokens that each row has seen (R,); those of the pass under way too, once the layer has them."""
        if self.reading is not None:
            return self.reading.offsets(layer)
        return mx.array([row.seen for row in self.rows], mx.int32)

    # ------------------------------------------------------------------ changes, whole or not at all

    def settle(self, wait: bool = False) -> None:
        """Carry out what is due after the last pass, or was broken off; ``wait`` until it is computed.

        Raises:
            CacheError: a pass is under way, or the cache cannot go on.
        """
        arena = self.arena
        arena.check()
        for row in self.rows:
            if any(row.taken_back):
                seen = [row.seen - count for count in row.taken_back]
                raise CacheError(
                    f"the layers have seen {min(seen)} to {max(seen)} tokens: taking tokens back was "
                    "broken off half way; make a new cache"
                )
        todo = [(row, move) for row in self.rows if (move := row.next()) is not None or row.wide is not None]
        if arena.unscored:
            waiting = sum(one.tokens for one in arena.waiting())
            if waiting >= arena.defer or any(move is not None for _, move in todo):
                arena.score(wait)
        if not todo:
            return
        own(arena, (row for row, _ in todo))
        capacity = arena.pool.capacity
        try:
            pool, recent = copy.copy(arena.pool), arena.recent.copy()
            rows = [(row, folded(row, recent)) for row, move in todo if move is None]
            if due := [(row, move) for row, move in todo if move is not None]:
                rows += compacted(due, pool, recent)
        except (RuntimeError, MemoryError) as error:
            if arena.passes.in_flight and not isinstance(error, KVRetError):
                arena.lose(error)
            raise
        arena.put(State([(arena.pool, vars(pool)), (arena.recent, vars(recent)), *rows]))
        del pool, recent, rows
        if arena.pool.capacity > capacity:
            # one by one, so that no two of the old arrays stand beside their larger copies
            for array in arena.pool.arrays():
                arena.compute(array, wait=True)
        # nothing may hold on to what has been decided upon, whether or not anyone looks at the pool soon
        lookup = arena.pool.lookup
        arena.compute([*arena.arrays(), lookup.table, lookup.offsets], wait)
        arena.tidy()

    def take_back(self, count: int, others: Sequence[Any] = ()) -> None:
        """Forget the newest ``count`` tokens of the only row, which no compaction has decided upon.

        ``others`` are entries of the same cache that do not compete.
        """
        copies = [copy.copy(one) for one in others]
        for one in copies:
            one.trim(count)
        pairs = [(one, dict(vars(twin))) for one, twin in zip(others, copies, strict=True)]
        self.arena.put(State([*pairs, (self.row, self.row.forgetting(count))]))

    def trim(self, layer: int, count: int) -> None:
        """As :meth:`take_back`, asked for one layer after the other; done when all layers were."""
        row = self.row
        # refused before the first layer has changed
        forgotten(row.pictures, row.seen - row.taken_back[layer] - count)
        taken = [n + count * (index == layer) for index, n in enumerate(row.taken_back)]
        whole = len(set(taken)) == 1
        self.arena.put(State([(row, row.forgetting(count) if whole else {"taken_back": taken})]))

    def confirm(self) -> None:
        """Wait for what is in flight of the layers that compete.

        Raises:
            CacheError: it failed, so that the cache cannot go on.
        """
        if self.passes.in_flight:
            self.arena.compute(self.arena.arrays(), wait=True)

    # ------------------------------------------------------------------ looking

    @property
    def entries(self) -> int:
        """Cached entries over all rows, layers and heads."""
        self.settle()
        return self.unsettled_entries

    @property
    def unsettled_entries(self) -> int:
        """Entries before anything that is due is carried out."""
        self.passes.check()
        return sum(row.entries for row in self.rows)

    def kept_positions(self, row: int = 0) -> list[list[Ints]]:
        """For each layer, for each KV head, the sorted positions of a row's entries (int64 arrays).

        Of several ranks all must ask, and all are told of the whole.
        """
        return by_layer(self.arena.share, self.own_positions(row), self.arena.whole.kv_heads)

    def own_positions(self, row: int = 0) -> list[Ints]:
        """The sorted positions of a row's entries in each of this process's flat heads (int64 arrays)."""
        self.settle()
        self.confirm()
        one, pool = self.rows[row], self.arena.pool
        offsets, position = pool.kept(one.slab)
        recent = np.arange(one.seen - one.length, one.seen)
        return [
            np.concatenate([np.sort(position[a:b]), recent]).astype(np.int64)
            for a, b in itertools.pairwise(offsets)
        ]

    def arrays(self) -> list[Any]:
        """Everything to be evaluated."""
        return self.arena.arrays()

    def layer_nbytes(self, layer: int) -> int:
        """A layer's share of the bytes of the rows' slabs and of what they hold; they add up to all of it."""
        if self.arena.share is None:
            size = self.arena.slab_nbytes(self.rows)
        else:
            # by arithmetic, for hosts on all ranks must decide the same by it
            size = sum({row.slab: row.counted for row in self.rows}.values())
        share, rest = divmod(size, self.shape.layers)
        return share + (rest if layer == 0 else 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bounded:
        """A single sequence gets an arena of its own, for any thread; rows of a batch share their slabs."""
        if self.batch:
            twin = self.copy()
        else:
            self.settle()
            self.confirm()
            row = alone(self.row)
            twin = Bounded(row.arena, [row])
        memo[id(self)] = twin
        return twin
