"""A process that waits for others in vain ends itself with a message.

What waits for another rank waits inside of a library that cannot be interrupted, so a thread looks on.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import ConfigError, RankLost

T = TypeVar("T")
VARIABLE, SECONDS = "MLX_KVRET_RANK_TIMEOUT", 300.0
STATUS = 75
# what errors of MLX's connections begin with
_LOST = re.compile(r"\[(ring|jaccl|mpi|nccl)\]")


def limit() -> float:
    """How many seconds a rank waits for the others.

    Raises:
        ConfigError: the environment says what is no number of seconds.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ConfigError(f"{VARIABLE} is {text!r}; expected a number of seconds above 0")
    return seconds


class _Wait:
    """Something that is waited for, until ``end``."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.progress()

    def progress(self) -> None:
        self.end = time.monotonic() + limit()


class _Watch:
    """What is waited for, the innermost last."""

    def __init__(self) -> None:
        self.waits: list[_Wait] = []
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._look, name="kvret-watch", daemon=True)
            self.thread.start()

    def _look(self) -> None:
        while True:
            time.sleep(0.25)
            # the innermost began last, and whoever ends one has made progress
            if any(wait.end < time.monotonic() for wait in self.waits[-1:]):
                said = sys.__stderr__ or sys.stderr
                said.write(
                    f"error: waited {limit():g} s for {self.waits[-1].what}; another rank is gone, hangs or "
                    f"does something else. Start all of them again ({VARIABLE} sets how long to wait)\n"
                )
                said.flush()
                os._exit(STATUS)


_watch = _Watch()


@contextmanager
def watched(what: str, together: bool = True) -> Iterator[None]:
    """The process ends if this takes longer than :func:`limit`; ``what`` it waits for, for the message.

    Nothing is looked at unless ``together``: who is alone takes as long as it takes.
    """
    if not together:
        yield
        return
    wait = _Wait(what)
    _watch.start()
    _watch.waits.append(wait)
    try:
        yield
    except RuntimeError as error:
        # MLX says so where another's watch was quicker, and has closed its connections
        if not _LOST.match(str(error)):
            raise
        raise RankLost(f"another rank is gone ({error}); start all of them again") from error
    finally:
        _watch.waits.remove(wait)
        for outer in _watch.waits:
            outer.progress()


def watched_steps(steps: Generator[T], what: str) -> Generator[T]:
    """As ``steps``, each of them :func:`watched`."""
    try:
        while True:
            with watched(what):
                found = next(steps, None)
            if found is None:
                return
            yield found
    finally:
        steps.close()
