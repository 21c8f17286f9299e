"""Which slabs of an arena are taken, by whom, and which are free: counting that every backend shares.

A *slab* is the room of one sequence in the arrays of an arena. Sequences that are copies of each other hold
the same slab until one of them is written to (copy on write). A slab is free again when its last holder is
gone, which Python's own reference counts tell, so nobody has to give anything back.
"""

from __future__ import annotations

from weakref import WeakSet

from ..errors import CacheError


class Hold:
    """A sequence's hold on the slab ``index``; it ends with the object, and is never copied but shared."""

    def __init__(self, index: int) -> None:
        self.index = index


class Slabs:
    """The slabs 0 … ``count`` - 1 of an arena.

    Holds are moved when slabs are: whoever keeps a :class:`Hold` asks it for its ``index`` each time.
    """

    def __init__(self, count: int) -> None:
        self._holds: list[WeakSet[Hold]] = [WeakSet() for _ in range(count)]

    @property
    def count(self) -> int:
        return len(self._holds)

    @property
    def used(self) -> list[int]:
        """Slabs that somebody holds, in order."""
        return [index for index, holds in enumerate(self._holds) if holds]

    @property
    def holds(self) -> list[Hold]:
        """Everybody's holds; while the list is kept no slab becomes free."""
        return [hold for holds in self._holds for hold in holds]

    def take(self) -> Hold:
        """Hold the lowest free slab.

        Raises:
            CacheError: all are taken; an arena grows first.
        """
        for index, holds in enumerate(self._holds):
            if not holds:
                return self._hold(index)
        raise CacheError(f"all {self.count} slabs of the arena are taken; grow it first")

    def share(self, hold: Hold) -> Hold:
        """A further hold on the same slab."""
        return self._hold(hold.index)

    def shared(self, hold: Hold) -> bool:
        """Whether somebody else holds the slab too, so that it is copied before it is written to."""
        return len(self._holds[hold.index]) > 1

    def move(self, hold: Hold, index: int) -> None:
        """This hold, and no other, is on the free slab ``index`` from now on."""
        if self._holds[index]:
            raise CacheError(f"slab {index} is taken; move a hold to a free one")
        # whatever breaks this off, a slab counts as taken rather than as free
        self._holds[index].add(hold)
        before, hold.index = hold.index, index
        self._holds[before].discard(hold)

    def resize(self, count: int) -> list[int]:
        """Have ``count`` slabs, those in use first and in their order.

        Returns where the new slabs' contents come from: the old index of each slab in use.

        Raises:
            CacheError: more are in use.
        """
        kept = self.used
        if count < len(kept):
            raise CacheError(f"{len(kept)} slabs are in use; an arena of {count} is too small")
        holds = [self._holds[index] for index in kept]
        for index, those in enumerate(holds):
            for hold in those:
                hold.index = index
        self._holds = holds + [WeakSet() for _ in range(count - len(kept))]
        return kept

    def _hold(self, index: int) -> Hold:
        hold = Hold(index)
        self._holds[index].add(hold)
        return hold
