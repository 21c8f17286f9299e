"""Forward passes as transactions: all of a pass's tokens are in the cache afterwards, or none.

A pass is begun with what undoes it, and committed by one assignment. Until then whatever ends it, an
interrupt at any point included, leaves the undoing to whoever comes next, if it could not be done at once.
"""

from __future__ import annotations

from typing import Any

from ..errors import CacheError
from .state import State

UNDER_WAY = (
    "a forward pass is under way in this cache; look at it when the pass is over, and give every thread a "
    "cache of its own"
)


class Passes:
    """What is known of a cache's passes: the one under way, and whether the cache can go on.

    ``open`` is the state to go back to while a pass is under way, ``running`` whether its end is still to
    come. ``in_flight`` says that the device has been asked for values and has not answered yet; what it
    fails at then is garbage, and is reported once, to whoever waits next. ``lost`` says why the cache cannot
    go on.
    """

    def __init__(self) -> None:
        self.open: State | None = None
        self.running = False
        self.in_flight = False
        self.lost = ""

    def begin(self, before: State) -> None:
        """A pass comes; ``before`` undoes it."""
        self.open, self.running = before, True

    def commit(self) -> None:
        """The pass is part of the cache."""
        self.open = None
        self.running = False

    @property
    def under_way(self) -> bool:
        """Whether a pass has begun whose end is still to come."""
        return self.running and self.open is not None

    def undo(self) -> None:
        """Go back to before the pass that was broken off, if there is one."""
        self.running = False
        if self.open is not None:
            self.open.put()
            self.open = None

    def lose(self, reason: str) -> None:
        """The cache cannot go on: what it holds is not known any more."""
        self.lost = self.lost or f"{reason}; make a new cache and read the text again"

    def repair(self) -> None:
        """Make the cache whole, if a pass was broken off that nobody undid.

        Raises:
            CacheError: a pass is under way.
        """
        if self.open is not None:
            if self.running:
                raise CacheError(UNDER_WAY)
            self.undo()

    def check(self) -> None:
        """Make the cache whole, or refuse to go on.

        Raises:
            CacheError: it cannot go on, or a pass is under way.
        """
        self.repair()
        if self.lost:
            raise CacheError(self.lost)

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        """Of a cache that was copied between its passes."""
        return Passes()
