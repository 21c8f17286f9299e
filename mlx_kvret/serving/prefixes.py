"""Snapshots of caches, found again by the hash of all the tokens they have read.

What was evicted cannot come back, so a prompt can go on only where a snapshot was kept. Each costs at most a
full budget, however long its text, so many small ones are kept: the least recently used goes first, those of
system prompts last.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..core.types import Ints


@dataclass(frozen=True)
class Key:
    """A snapshot's name: how many tokens it has read, and a hash of them and of whose they are."""

    length: int
    digest: str


class Prefix:
    """Token ids as keys. ``owner`` is what must agree besides them: model, gates, budget, a user's salt."""

    def __init__(self, owner: Sequence[str], ids: Sequence[int] | Ints) -> None:
        self._owner, self._start = owner, hashlib.sha256()
        for part in owner:
            # with its length, so that no part can pass for two
            data = part.encode("utf-8", "surrogatepass")
            self._start.update(len(data).to_bytes(8, "little") + data)
        self._ids = np.asarray(ids, "<i4")

    def longer(self, ids: Ints) -> Prefix:
        """Other tokens of the same owner."""
        return Prefix(self._owner, ids)

    def key(self, length: int) -> Key:
        return next(self.keys([length]))

    def keys(self, lengths: Sequence[int]) -> Iterator[Key]:
        """Of the first ``lengths`` tokens, which must rise."""
        hashed, done = self._start.copy(), 0
        for length in lengths:
            hashed.update(self._ids[done:length].tobytes())
            done = length
            yield Key(length, hashed.copy().hexdigest())


class Beside(Protocol):
    """Where snapshots go that memory has no room for."""

    def lengths(self) -> list[int]:
        """The lengths of what is there."""

    def __contains__(self, key: Key) -> bool: ...

    def put(self, key: Key, cache: Any, wait: bool = False) -> None:
        """Take a cache over, to be written later; if too many wait, ``wait`` too or drop it."""

    def get(self, key: Key) -> Any:
        """A cache; PENDING while it is being read, None if it cannot be had."""

    def close(self) -> None: ...


# what is being fetched: ask again
PENDING = object()


class Pools(Protocol):
    """Of caches at rest: what several may have in common."""

    def share(self, cache: Any, parent: Any) -> None:
        """Have a cache refer to what a parent of its holds too, where nothing was decided upon since."""

    def pool(self, cache: Any) -> tuple[int, int]:
        """Which part of it others may refer to, by its id, and its bytes."""


@dataclass
class _Kept:
    cache: Any
    own: int
    pool: tuple[int, int]
    pinned: bool


class Prefixes:
    """Snapshots within ``limit`` bytes of memory; what several refer to counts once.

    Args:
        copy: of a cache, so that what is found can go on while the snapshot stays.
        pools: how snapshots share what they hold; None: they do not.
    """

    def __init__(
        self,
        limit: int,
        copy: Callable[[Any], Any],
        beside: Beside | None = None,
        pools: Pools | None = None,
    ) -> None:
        self.limit, self.nbytes = limit, 0
        self._copy, self._beside, self._pools = copy, beside, pools
        # how many snapshots refer to each pool
        self._referring = Counter[int]()
        # the least recently used first
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._lengths = Counter[int]()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, prefix: Prefix, most: int) -> Key | None:
        """The longest snapshot, here or beside, of at most ``most`` tokens that a prompt begins with."""
        lengths = set(self._lengths) | set(self._beside.lengths() if self._beside else ())
        found = None
        for key in prefix.keys(sorted(length for length in lengths if length <= most)):
            if key in self._kept or (self._beside is not None and key in self._beside):
                found = key
        return found

    def get(self, key: Key) -> Any:
        """A cache that goes on from a snapshot; PENDING: ask again; None: it is gone."""
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return self._copy(kept.cache)
        found = None if self._beside is None else self._beside.get(key)
        if found is not None and found is not PENDING:
            self.put(key, lambda: self._copy(found))
        return found

    def kept(self, key: Key) -> Any:
        """The snapshot itself, which must not be changed; None if it is not in memory."""
        found = self._kept.get(key)
        return None if found is None else found.cache

    def put(self, key: Key, make: Callable[[], Any], pinned: bool = False, parent: Any = None) -> Any:
        """Keep a cache, made only if there is none yet; from then on it is this store's own.

        ``parent`` is a snapshot that the cache went on from, or that was made of it before. Returns what is
        kept of this cache; None if there was one of its key, or no room.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            self._kept[key].pinned |= pinned
            return None
        if self.limit == 0:
            return None
        cache = make()
        nbytes, pool = int(cache.nbytes), (0, 0)
        if nbytes > self.limit:
            return None
        if self._pools is not None:
            if parent is not None:
                self._pools.share(cache, parent)
            pool = self._pools.pool(cache)
        own = nbytes - pool[1]
        # of a pool that goes with its last other snapshot the bytes are this one's
        while self.nbytes + own + pool[1] * (not self._referring[pool[0]]) > self.limit:
            self._push_out()
        self.nbytes += own + pool[1] * (not self._referring[pool[0]])
        self._referring[pool[0]] += 1
        self._kept[key] = _Kept(cache, own, pool, pinned)
        self._lengths[key.length] += 1
        return cache

    def close(self) -> None:
        """Push everything out, and wait until it is where it goes."""
        while self._kept:
            self._push_out(wait=True)
        if self._beside is not None:
            self._beside.close()

    def _push_out(self, wait: bool = False) -> None:
        key = next((key for key, kept in self._kept.items() if not kept.pinned), next(iter(self._kept)))
        kept = self._kept.pop(key)
        self._referring -= Counter([kept.pool[0]])
        self.nbytes -= kept.own + kept.pool[1] * (not self._referring[kept.pool[0]])
        self._lengths -= Counter([key.length])
        if self._beside is not None:
            self._beside.put(key, kept.cache, wait)
