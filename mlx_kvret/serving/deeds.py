"""What every rank does with its part of the caches: what the first one says, in its order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..core.watch import watched
from .backend import Backend
from .batched import Batched
from .drawing import Drawing
from .engine import Engine, OneByOne

# what runs no model and asks no other rank, so that a failure leaves all ranks at the same point
ALONE = frozenset({"nothing", "new", "copy", "reset", "end"})


class Deeds:
    """A rank's caches by the numbers that the first rank has given them, and the rows that decode.

    Deeds and what they are given are what a message can hold: names, numbers and lists of them.
    """

    def __init__(self, backend: Backend, rows: int) -> None:
        self._backend = backend
        self.caches: dict[int, Any] = {}
        self._engine: Engine = Batched(backend, rows) if backend.batches else OneByOne(backend)
        self._known: dict[str, Callable[..., Any]] = {
            "nothing": lambda: None,
            "new": self._new,
            "copy": self._copy,
            "read": self._read,
            "join": self._join,
            "step": self._engine.step,
            "leave": self._leave,
            "look": self._look,
            "kept": lambda number: self.caches[number].kept_positions(),
            "reset": self._engine.reset,
            "end": self._engine.reset,
        }

    def do(self, deed: str, dropped: Sequence[int], given: Sequence[Any]) -> Any:
        """One deed, once the caches that nobody uses any more are let go."""
        for number in dropped:
            self.caches.pop(number, None)
        with watched(f"the other ranks ({deed})", deed not in ALONE):
            return self._known[deed](*given)

    def _new(self, number: int, budget: int | None) -> None:
        self.caches[number] = self._backend.new_cache(budget)

    def _copy(self, number: int, made: int) -> None:
        self.caches[made] = self._backend.copy(self.caches[number])

    def _read(self, number: int, ids: list[int]) -> None:
        cache = self.caches[number]
        self._backend.read(cache, ids)
        # what is due is carried out by all, before anyone looks alone
        cache.settle()

    def _join(self, number: int, token: int, asked: dict[str, Any]) -> int:
        return self._engine.join(self.caches[number], token, self._backend.chooser(drawing_of(asked)))

    def _leave(self, row: int, made: int) -> None:
        cache = self.caches[made] = self._engine.leave(row)
        cache.settle()

    def _look(self, row: int, made: int) -> None:
        cache = self.caches[made] = self._engine.look(row)
        cache.settle()


def told_of(drawing: Drawing) -> dict[str, Any]:
    """A drawing as a message holds it."""
    return dataclasses.asdict(drawing) | {"bias": list(drawing.bias.items())}


def drawing_of(told: dict[str, Any]) -> Drawing:
    """What :func:`told_of` was given."""
    return Drawing(**told | {"bias": {int(token): float(added) for token, added in told["bias"]}})
