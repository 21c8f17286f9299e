"""Objects as they are or shall be: what makes a change of several of them whole or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Values = dict[str, Any]


class State:
    """Attributes of several objects, to be put in place together.

    Taken before a change it undoes what was broken off; made of copies it carries out what was decided.
    Either may be broken off itself, by an interrupt say, and is then done again: the end is the same. So
    attributes must be replaced by new values, never changed in place.
    """

    def __init__(self, held: Iterable[tuple[Any, Values]]) -> None:
        self._held = list(held)

    @classmethod
    def of(cls, objects: Iterable[Any], kept: Callable[[Any], Any] = lambda value: value) -> State:
        """The objects as they are now; ``kept`` makes values safe that others change in place."""
        return cls((one, {name: kept(value) for name, value in vars(one).items()}) for one in objects)

    @classmethod
    def becoming(cls, pairs: Iterable[tuple[Any, Any]]) -> State:
        """The first of each pair as the second, a changed copy, is now."""
        return cls((one, dict(vars(copy))) for one, copy in pairs)

    @classmethod
    def all(cls, states: Iterable[State]) -> State:
        """Several as one."""
        return cls(held for state in states for held in state._held)

    def put(self) -> None:
        """Have the objects so."""
        for one, values in self._held:
            vars(one).update(values)
