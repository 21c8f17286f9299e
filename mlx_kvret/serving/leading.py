"""One server over several ranks: the first one decides, and says each step to the others before it takes it.

Messages go over the group in which the model's own sums go: no further port has to be open, no address be
known, and nobody else can speak. Where nothing happens the first rank says so now and then, and the others
sleep in between, so that none waits in vain for one that is gone, and none burns a core.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..core.line import PAUSE, Line
from ..core.watch import STATUS
from ..errors import ConfigError, KVRetError, RankLost
from .backend import Backend
from .deeds import ALONE, Deeds, told_of
from .drawing import Drawing
from .engine import Step

log = logging.getLogger(__name__)


class Held:
    """A cache of which each rank has its part, as the first one sees it; nothing is due."""

    def __init__(self, leader: Leader, number: int) -> None:
        self.number, self._leader = number, leader
        self._own = leader.deeds.caches[number]

    @property
    def seen(self) -> int:
        return int(self._own.seen)

    @property
    def entries(self) -> int:
        return int(self._own.entries)

    @property
    def nbytes(self) -> int:
        return int(self._own.nbytes)

    def kept_positions(self) -> Any:
        return self._leader.do("kept", self.number)


class Leader:
    """The first rank's :class:`.backend.Passes` and :class:`.engine.Engine`, in which all ranks take part.

    ``leaving`` says that another rank was told to end. After a failure that not all ranks had in common
    every call raises.
    """

    def __init__(self, backend: Backend, rows: int) -> None:
        ranks = backend.ranks
        assert ranks is not None
        self.deeds, self.leaving = Deeds(backend, rows), False
        self._backend, self._line = backend, Line(ranks)
        self._count = itertools.count()
        # filled by whichever thread lets go of a cache last
        self._dropped: deque[int] = deque()
        self._lost: RankLost | None = None

    def do(self, deed: str, *given: Any) -> Any:
        """Have all ranks do something.

        Raises:
            RankLost: the ranks cannot go on, or those that failed at a deed which all are over with.
        """
        if self._lost is not None:
            raise self._lost
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        try:
            self._line.say([deed, dropped, given])
            found, failed, leaving = _together(self._line, self.deeds, deed, dropped, given, False)
        except RankLost as error:
            self._lost = error
            raise
        self.leaving |= leaving
        if isinstance(found, Exception):
            raise found
        if failed:
            raise KVRetError(f"rank {failed[0]} failed at this and says why; the server goes on")
        return found

    def _made(self, deed: str, *given: Any) -> Held:
        """A cache that a deed makes."""
        number = next(self._count)
        try:
            self.do(deed, *(number if one is Ellipsis else one for one in given))
            held = Held(self, number)
        except BaseException:
            self._dropped.append(number)
            raise
        weakref.finalize(held, self._dropped.append, number)
        return held

    def beat(self) -> None:
        """Say that nothing happens."""
        self.do("nothing")

    # ------------------------------------------------------------- a backend

    def new_cache(self, budget: int | None) -> Held:
        return self._made("new", ..., budget)

    def copy(self, cache: Held) -> Held:
        return self._made("copy", cache.number, ...)

    def read(self, cache: Held, ids: list[int]) -> None:
        self.do("read", cache.number, ids)

    def chooser(self, asked: Drawing) -> Drawing:
        """For :meth:`join`, in which every rank makes its own; all draw from one seed."""
        return (
            asked if asked.temp == 0 or asked.seed is not None else replace(asked, seed=secrets.randbits(31))
        )

    def host(self, logprobs: Any) -> Any:
        return self._backend.host(logprobs)

    def looking(self, cache: Any, made: dict[str, Any], chunk: int) -> Iterator[int]:
        raise ConfigError("pictures are read in one process; drop them")

    # ------------------------------------------------------------- an engine

    def join(self, cache: Held, token: int, choose: Drawing) -> int:
        return int(self.do("join", cache.number, token, told_of(choose)))

    def step(self) -> list[Step]:
        found: list[Step] = self.do("step")
        return found

    def leave(self, row: int) -> Held:
        return self._made("leave", row, ...)

    def look(self, row: int) -> Held:
        return self._made("look", row, ...)

    def reset(self) -> None:
        if self._lost is None:
            self.do("reset")

    def close(self) -> None:
        """Have the other ranks end."""
        if self._lost is None:
            self.do("end")


def follow(backend: Backend, rows: int) -> None:
    """Do what the first rank says until it says the end. The first signal is passed on to it.

    Raises:
        RankLost: the ranks cannot go on.
    """
    ranks = backend.ranks
    assert ranks is not None
    line, deeds, leaving = Line(ranks), Deeds(backend, rows), threading.Event()

    def leave(number: int, frame: Any) -> None:
        if leaving.is_set():
            os._exit(STATUS)
        leaving.set()

    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, leave)
    deed = ""
    while deed != "end":
        deed, dropped, given = line.say()
        found, _, _ = _together(line, deeds, deed, dropped, given, leaving.is_set())
        if isinstance(found, Exception):
            log.error("a step failed", exc_info=found)
        if deed == "nothing":
            time.sleep(PAUSE)


def _together(
    line: Line, deeds: Deeds, deed: str, dropped: list[int], given: Any, leaving: bool
) -> tuple[Any, list[int], bool]:
    """What this rank's part of a deed gave or raised, which ranks failed at it, and who is told to end.

    Raises:
        RankLost: it failed where the others may be in the midst of their sums, which no message can reach.
    """
    found: Any = None
    try:
        found = deeds.do(deed, dropped, given)
    except RankLost:
        raise
    except Exception as error:
        if deed not in ALONE:
            raise RankLost(
                f"rank {line.ranks.rank} failed ({deed}: {error}), and how far the others are none can tell; "
                "start all of them again"
            ) from error
        found = error
    failed, others = line.heard(isinstance(found, Exception), leaving)
    return found, failed, others
