"""The cache as mlx-lm knows it: a list with one entry per layer, here with entries that share one budget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.passes import Passes
from ..core.pictures import Modality, Pictures, forgotten, of_modality
from ..core.shares import Share
from ..core.types import Ints
from ..errors import ConfigError, UnsupportedFeatureError
from .bounded import Bounded
from .entry import BoundedKVCache
from .vision import Sight


class BoundedCache(list[Any]):
    """A prompt cache: one entry per layer, as mlx-lm wants it, and figures over all of them.

    Entries of competing layers are :class:`BoundedKVCache`; sliding-window and state-space layers keep their
    own kind. ``shared`` is None if nothing is ever evicted (policy ``"full"``).
    """

    def __init__(
        self,
        entries: Iterable[Any],
        shared: Bounded | None,
        competing: list[Any],
        share: Share | None = None,
    ) -> None:
        super().__init__(entries)
        # of a cache that evicts nothing; others know it themselves
        self._share = share
        self.shared, self.competing = shared, competing
        self.passes = Passes() if shared is None else shared.passes
        self._identity = ""
        # of a cache that evicts nothing; rows have their own
        self.sight = Sight()

    @property
    def identity(self) -> str:
        """The model and gates it belongs to."""
        return self._identity if self.shared is None else self.shared.identity

    @identity.setter
    def identity(self, identity: str) -> None:
        if self.shared is not None:
            self.shared.arena.identity = identity
        self._identity = identity

    @property
    def seen(self) -> int:
        """Tokens seen so far; in a batch by the longest row."""
        self.passes.repair()
        return int(self.competing[0].offset if self.shared is None else self.competing[0].size())

    @property
    def entries(self) -> int:
        """Cached entries of the competing layers: one token in one KV head of one layer each."""
        self.settle()
        return self.unsettled_entries

    @property
    def unsettled_entries(self) -> int:
        """Entries before a compaction that is due; unlike ``entries`` this leaves all tokens trimmable."""
        if self.shared is not None:
            return self.shared.unsettled_entries
        self.passes.repair()
        held = sum(c.offset * c.keys.shape[1] for c in self.competing if c.keys is not None)
        return held if self._share is None else self._share.of_whole(held)

    @property
    def nbytes(self) -> int:
        """Bytes of everything cached: keys, values, retention, positions, tables, waiting gate inputs."""
        self.settle()
        return self.unsettled_nbytes

    @property
    def unsettled_nbytes(self) -> int:
        """Bytes before a compaction that is due."""
        self.passes.repair()
        held = sum(c.nbytes for c in self)
        return held if self._share is None else self._share.of_whole(held)

    def settle(self) -> None:
        """Carry out a compaction that is due now instead of before the next forward pass."""
        if self.shared is not None:
            self.shared.settle()
        self.passes.check()

    def kept_positions(self, row: int = 0, modality: Modality | None = None) -> list[list[Ints]]:
        """For each competing layer, for each KV head, the sorted positions of a row's entries.

        Args:
            modality: those of ``"text"`` or of ``"picture"`` only.
        """
        kept = self._kept(row)
        if modality is None:
            return kept
        pictures = self.pictures if self.shared is None else self.shared.rows[row].pictures
        return of_modality(kept, pictures, modality)

    def _kept(self, row: int) -> list[list[Ints]]:
        if self.shared is not None:
            return self.shared.kept_positions(row)
        self.passes.check()
        if self._share is not None:
            whole = self._share.whole
            return [[np.arange(self.seen)] * whole.kv_heads for _ in range(whole.layers)]
        heads = [0 if c.keys is None else c.keys.shape[1] for c in self.competing]
        return [[np.arange(c.offset)] * n for c, n in zip(self.competing, heads, strict=True)]

    @property
    def pictures(self) -> Pictures:
        """The pictures among the tokens seen, first to last, of a single sequence."""
        self.passes.repair()
        return forgotten(self.sight.pictures, self.seen) if self.shared is None else self.shared.row.pictures

    # -------------------------------------------------- rows

    @property
    def rows(self) -> int:
        """Sequences it holds."""
        return 1 if self.shared is None else len(self.shared.rows)

    def copy(self) -> BoundedCache:
        """A cache of the same sequences, which costs nothing until either is written to.

        The two share arrays, so that they belong to one thread; ``copy.deepcopy`` shares nothing.
        """
        self.settle()
        if self.shared is None:
            return copy.deepcopy(self)
        return self._with(self.shared.copy(), [copy.deepcopy(part) for part in self._others])

    def row(self, index: int) -> BoundedCache:
        """A single sequence of it, in a cache that later passes do not touch; it costs as much as a copy."""
        shared = self._competing_only()
        others = [part.extract(index) if shared.batch else copy.deepcopy(part) for part in self._others]
        return self._with(shared.extract(index), others)

    def filter(self, keep: Sequence[int]) -> None:
        """Keep these rows, in this order.

        Raises:
            ConfigError: there is no such row.
        """
        shared = self._batch()
        shared.filter(keep)
        for part in self._others:
            part.filter(list(keep))

    def split(self, which: Sequence[int]) -> BoundedCache:
        """These rows leave for a cache of their own, in this order."""
        leaving = self.copy()
        leaving.filter(which)
        self.filter([at for at in range(self.rows) if at not in set(which)])
        return leaving

    def extend(self, other: Any) -> None:
        """Append another cache's rows, whose clocks may differ; they leave it.

        Raises:
            ModelMismatchError: they belong to another model or other gates.
            UnsupportedFeatureError: they compete by another rule, or the model's layers know no batches.
        """
        if not isinstance(other, BoundedCache):
            raise ConfigError(f"a {type(other).__name__} has no rows that could join; give a bounded cache")
        self._batch().extend(other._batch())
        for ours, theirs in zip(self._others, other._others, strict=True):
            ours.extend(theirs)

    def prepare(self, lengths: Sequence[int]) -> None:
        """The passes to come bring so many tokens to each row, padded on the right.

        Raises:
            CacheError: they are not as many as rows.
        """
        self._batch().expect(list(lengths))
        for part in self._others:
            part.prepare(lengths=list(lengths), right_padding=[max(lengths) - n for n in lengths])

    def finalize(self) -> None:
        """Passes have no padding any more."""
        self._batch().expect(None)
        for part in self._others:
            part.finalize()

    @property
    def _others(self) -> list[Any]:
        return [part for part in self if not isinstance(part, BoundedKVCache)]

    def _competing_only(self) -> Bounded:
        if self.shared is None:
            raise UnsupportedFeatureError(
                "a cache that evicts nothing (policy 'full') has no rows of its own; use mlx-lm's batches"
            )
        return self.shared

    def _batch(self) -> Bounded:
        """What the layers share, of a batch from now on."""
        shared = self._competing_only()
        if not shared.batch:
            if not all(hasattr(part, "merge") for part in self):
                raise UnsupportedFeatureError(
                    "batches do not work with this model, some of whose layers know one sequence only; use "
                    "one cache for each sequence"
                )
            merged = [part if isinstance(part, BoundedKVCache) else part.merge([part]) for part in self]
            self[:] = merged
            shared.batch = True
        return shared

    def _with(self, shared: Bounded, others: list[Any]) -> BoundedCache:
        """A cache of the same layers on other rows."""
        rest, competing = iter(others), [entry.on(shared) for entry in self.competing]
        ours = iter(competing)
        entries = [next(ours) if isinstance(part, BoundedKVCache) else next(rest) for part in self]
        return BoundedCache(entries, shared, competing)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedCache:
        self.settle()
        entries = copy.deepcopy(list(self), memo)
        # memo maps each old entry to its copy
        shared, competing = copy.deepcopy(self.shared, memo), copy.deepcopy(self.competing, memo)
        twin = BoundedCache(entries, shared, competing, self._share)
        twin.identity = self.identity
        twin.sight = copy.copy(self.sight)
        # another thread could not compute what this one has built
        mx.eval([list(vars(part).values()) for part in _others(entries)])
        return twin


def _others(entries: list[Any]) -> list[Any]:
    parts = [part for entry in entries for part in getattr(entry, "caches", (entry,))]
    return [part for part in parts if not isinstance(part, BoundedKVCache)]
