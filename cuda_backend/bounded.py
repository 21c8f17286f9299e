"""What the layers of one cache share: rows of an arena, which read together and are settled one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.passes import Passes
from mlx_kvret.core.pictures import forgotten
from mlx_kvret.core.shares import Share, by_layer
from mlx_kvret.core.state import State
from mlx_kvret.core.types import Ints
from mlx_kvret.errors import CacheError, ConfigError, ModelMismatchError, UnsupportedFeatureError

from .arena import Arena
from .compaction import settle
from .gates import RetentionGates
from .modes import ordinary
from .reading import Reading
from .row import Row, run_gates


class Bounded:
    """A cache of L competing layers that holds at most (M + B)·L·H entries per row between passes.

    A compaction that is due after a forward pass is carried out by :meth:`settle`, before the next one or as
    soon as anyone looks, whichever comes first. So tokens of the last pass can still be taken back, and a
    decoding loop never waits. How many entries there are is arithmetic, never read from the device.

    ``places`` is what hosts count: rows stand right-aligned in so many, and those before a row's first token
    are padding, which is no entry. Positions count from there, so that a row is treated as it would be alone.
    """

    def __init__(self, arena: Arena, rows: Sequence[Row], places: int = 0) -> None:
        self.arena, self.rows, self.places = arena, list(rows), places
        self.reading: Reading | None = None
        self._lengths: tuple[int, ...] | None = None

    @classmethod
    def single(
        cls,
        shape: CacheShape,
        config: EvictionConfig,
        owner: dict[str, str],
        device: torch.device,
        gates: RetentionGates | None = None,
        gate_layers: Sequence[int] | None = None,
        share: Share | None = None,
    ) -> Bounded:
        """An empty sequence in an arena of its own."""
        arena = Arena(shape, config, owner, device, gates, gate_layers, share)
        return cls(arena, [Row.new(arena, config)])

    @property
    def shape(self) -> CacheShape:
        return self.arena.shape

    @property
    def config(self) -> EvictionConfig:
        """The first row's, or that of the arena where there is none."""
        return self.rows[0].config if self.rows else self.arena.config

    @property
    def passes(self) -> Passes:
        return self.arena.passes

    @property
    def padding(self) -> list[int]:
        """Places before each row's first token."""
        return [self.places - row.seen for row in self.rows]

    # ------------------------------------------------------------------ a forward pass

    def prepare(self, lengths: Sequence[int]) -> None:
        """The next pass brings so many real tokens to each row, padded on the right."""
        if len(lengths) != len(self.rows) or min(lengths, default=0) < 0:
            raise ConfigError(
                f"lengths are {list(lengths)}; expected a number of tokens for each of {len(self.rows)} rows"
            )
        self._lengths = tuple(map(int, lengths))

    @ordinary
    def begin(self, rows: int, tokens: int, mask: torch.Tensor | None = None) -> None:
        """A forward pass of ``rows`` sequences of ``tokens`` places comes.

        ``mask`` (R, at least places + T) is False where padded, unless :meth:`prepare` has told it.

        Raises:
            UnsupportedFeatureError: another number of sequences than before, or padding not on the left.
        """
        lengths, self._lengths = self._lengths, None
        if not self.passes.under_way:
            self.settle()
        if rows != len(self.rows):
            if self.places or not self.rows:
                raise UnsupportedFeatureError(
                    f"a batch of {rows} sequences came to a cache that holds {len(self.rows)}; make a new "
                    "cache"
                )
            self.arena.reserve(rows - len(self.rows))
            self.rows = [Row.new(self.arena, self.config) for _ in range(rows)]
        if lengths is not None and max(lengths) > tokens:
            raise ConfigError(f"lengths are up to {max(lengths)} in a pass of {tokens} tokens; lower them")
        counts = lengths or self._counts(tokens, mask)
        self.reading = Reading(self.arena, self.rows, tokens, counts, lengths is not None)
        if (before := self.passes.open) is not None:
            # what the gates have been asked for since stays scored
            scored = State((row, {"scored": row.scored}) for row in self.rows)
            self.passes.open = State.all([before, scored])

    def _counts(self, tokens: int, mask: torch.Tensor | None) -> Sequence[int]:
        """Real tokens of each row, by a mask that says what came before them."""
        if mask is None:
            return [tokens] * len(self.rows)
        mask = mask.bool()
        begun = all(row.seen for row in self.rows)
        if begun and mask.shape[1] == self.places + 1 and self.arena.device.type != "cpu":
            # a decoding step must not wait for the device
            torch._assert_async(mask[:, -1].all(), "a sequence of the batch is padded after its first token")
            return [tokens] * len(self.rows)
        ragged = (mask[:, 1:] < mask[:, :-1]).any()
        *padding, strange = torch.stack([*(~mask).sum(1), ragged.long()]).tolist()
        past = any(min(n, self.places) != own for n, own in zip(padding, self.padding, strict=True))
        if strange or past:
            raise UnsupportedFeatureError(
                "the attention mask hides tokens other than those before a sequence's first one; pad on the "
                "left (tokenizer.padding_side = 'left') and keep a mask as it was for tokens already read"
            )
        return [tokens - min(max(n - self.places, 0), tokens) for n in padding]

    def before(self) -> State:
        """What undoes a forward pass."""
        shared = {"rows": self.rows, "places": self.places, "reading": None}
        names = ("seen", "length", "scored", "chunk", "pictures")
        rows = ((row, {name: getattr(row, name) for name in names}) for row in self.rows)
        return State([(self, shared), *rows])

    def commit(self) -> None:
        """The pass has come to its end."""
        if self.reading is not None:
            self.reading.commit()
            vars(self).update(places=self.places + self.reading.tokens, reading=None)

    @ordinary
    def take_back(self, count: int) -> None:
        """Forget the newest ``count`` places, whose tokens no compaction was of; part of a transaction."""
        rows = []
        for row in self.rows:
            length = row.length - min(count, row.seen)
            seen = row.seen - min(count, row.seen)
            kept = forgotten(row.pictures, seen)
            own = {"seen": seen, "length": length, "scored": min(row.scored, length), "pictures": kept}
            rows.append((row, own))
        State([*rows, (self, {"places": self.places - count})]).put()

    @property
    def to_take_back(self) -> int:
        """How many places can be taken back at most."""
        return min((row.length for row in self.rows if row.length < row.seen), default=self.places)

    @ordinary
    def settle(self) -> None:
        """Carry out what is due after the last forward pass, or was broken off.

        Raises:
            CacheError: a pass is under way, or the cache cannot go on.
        """
        arena = self.arena
        arena.check()
        if lost := next((row.lost for row in self.rows if row.lost), ""):
            raise CacheError(lost)
        if arena.gates is not None and any(row.waiting >= arena.defer for row in self.rows):
            run_gates(self.rows)
        settle([row for row in self.rows if row.chunk is not None or row.length >= row.schedule.soonest])

    def lose(self, reason: str) -> None:
        """The rows cannot go on: what they hold is not known any more."""
        for row in self.rows:
            row.lost = row.lost or f"{reason}; make a new cache and read the text again"

    # ------------------------------------------------------------------ rows that join and leave

    @ordinary
    def copy(self) -> Bounded:
        """The rows once more, on the same slabs until either is written to."""
        self.settle()
        return Bounded(self.arena, [row.twin() for row in self.rows], self.places)

    @ordinary
    def extract(self, index: int) -> Bounded:
        """One row once more, as a single sequence, on the same slab until either is written to."""
        self.settle()
        twin = self.rows[index].twin()
        return Bounded(self.arena, [twin], twin.seen)

    @ordinary
    def own_copy(self) -> Bounded:
        """The rows once more, in an arena of their own."""
        self.settle()
        arena = self.arena.fresh()
        arena.reserve(len(self.rows))
        return Bounded(arena, [row.copied(arena) for row in self.rows], self.places)

    @ordinary
    def filter(self, keep: Sequence[int]) -> None:
        """Keep these rows, in this order; the others' slabs are free."""
        self.settle()
        self.rows = [self.rows[at] for at in keep]
        self.arena.tidy()

    @ordinary
    def extend(self, other: Bounded) -> None:
        """Append another cache's rows, which leave it; those of another arena are copied.

        Raises:
            ModelMismatchError: they belong to another model or other gates.
            UnsupportedFeatureError: they compete by another rule.
        """
        self.check_joins(other)
        self.settle()
        other.settle()
        rows, ours = other.rows, self.arena
        if other.arena is not ours:
            ours.reserve(len(rows))
            rows = [row.copied(ours) for row in rows]
        places = max((self.places, other.places) if self.rows else (other.places,))
        self.arena.put(State([
            (self, {"rows": [*self.rows, *rows], "places": places}), (other, {"rows": [], "places": 0})
        ]))  # fmt: skip

    def check_joins(self, other: Bounded) -> None:
        """Refuse rows that :meth:`extend` would not take. Raises as that does."""
        if other is self:
            raise ConfigError("a cache cannot be extended by itself; give a copy")
        ours, theirs = self.arena, other.arena
        if theirs.identity != ours.identity or theirs.shape != ours.shape:
            raise ModelMismatchError(
                "the rows belong to another model or other gates; make their cache for this one"
            )
        for name in ("policy", "scope", "kv_bits"):
            found, expected = getattr(theirs.config, name), getattr(ours.config, name)
            if found != expected:
                raise UnsupportedFeatureError(
                    f"a row of {name} {found!r} cannot join those of {expected!r}; keep batches of each"
                )

    # ------------------------------------------------------------------ looking

    @property
    def entries(self) -> int:
        """Cached entries over all sequences, layers and heads."""
        self.settle()
        return sum(row.entries for row in self.rows)

    def kept_positions(self, row: int = 0) -> list[list[Ints]]:
        """For each layer, for each KV head, the sorted positions of a sequence's entries (int64 arrays).

        Of several ranks all must ask, and all are told of the whole.
        """
        return by_layer(self.arena.share, self._own_positions(row), self.arena.whole.kv_heads)

    def _own_positions(self, row: int) -> list[Ints]:
        """Those of each of this process's flat heads."""
        self.settle()
        own, pool = self.rows[row], self.arena.pool
        slab, offsets = own.slab, pool.host_offsets(own.hold.index)
        position = slab.position.cpu().numpy()[slab.table.cpu().numpy()]
        recent = np.arange(own.seen - own.length, own.seen)
        return [
            np.concatenate([np.sort(position[a:b]), recent]).astype(np.int64)
            for a, b in itertools.pairwise(offsets)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs the rows stand on."""
        self.settle()
        if self.arena.share is not None:
            # by arithmetic, for hosts on all ranks must decide the same by it
            return sum({row.hold.index: row.counted for row in self.rows}.values())
        slabs = {row.hold.index for row in self.rows}
        return self.arena.nbytes // self.arena.slabs.count * len(slabs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bounded:
        memo[id(self)] = twin = self.own_copy()
        return twin
