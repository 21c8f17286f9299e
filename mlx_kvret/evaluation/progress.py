"""How far a long run is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

EVERY = 60.0


class Progress:
    """Units done of ``total``, of which ``already`` were there; with a bar, or lines every minute.

    ``line`` takes the lines; they go to stderr unless given.
    """

    def __init__(
        self,
        total: int,
        already: int,
        shown: bool = True,
        line: Callable[[str], None] | None = None,
        unit: str = "cell",
    ) -> None:
        self._unit = unit
        self._total, self._already, self._done, self._last = total, already, 0, 0
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=already, disable=not (shown and terminal), unit=unit)
        self._line: Callable[[str], None] | None = (line or _to_stderr) if shown and not terminal else None
        self._start = time.monotonic()
        self._told = -EVERY
        self._current = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._line and self._done > self._last:
            self._tell()

    def starts(self, text: str) -> None:
        """A unit begins."""
        self._bar.set_postfix_str(text)
        self._current = text

    def done(self) -> None:
        """It is finished."""
        self._done += 1
        self._bar.update()
        passed = time.monotonic() - self._start
        if self._line and passed - self._told >= EVERY:
            self._told = passed
            self._tell()

    def _tell(self) -> None:
        passed, self._last = time.monotonic() - self._start, self._done
        there = self._already + self._done
        left = passed / self._done * (self._total - there)
        times = f"{_span(passed)} gone, about {_span(left)} left"
        assert self._line
        self._line(f"{there} of {self._total} {self._unit}s, {times} ({self._current})")


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
