"""What a person sees: words and remarks in the terminal's width, and a bar while it takes long."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import click

from ..core.plain import plain, spoken

# no narrower: a terminal that tells nothing says 0
_LEAST = 20
# seconds between two lines on a long reading where there is no terminal
_EVERY = 60.0


def columns(stream: TextIO) -> int | None:
    """The width of the terminal that a stream goes to; None where it goes elsewhere."""
    return max(shutil.get_terminal_size().columns, _LEAST) if stream.isatty() else None


def note(text: str, err: bool = False) -> None:
    """Print a remark of ours, which may quote a file, within the terminal's width."""
    click.echo(fitted(plain(text), columns(sys.stderr if err else sys.stdout)), err=err)


def fitted(text: str, width: int | None, indent: str = "") -> str:
    """Text whose lines are broken between words, those that go on behind an ``indent``; None leaves it."""
    if width is None:
        return text
    lines = (
        textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
        for line in text.expandtabs().split("\n")
    )
    return "\n".join(line for part in lines for line in part)


def cells(character: str) -> int:
    """Columns that a character takes on a terminal."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Words:
    """Text that comes in pieces, with a line break before the word that would reach over ``width``.

    A word is held back until it is whole; None as a width changes nothing.
    """

    def __init__(self, width: int | None) -> None:
        self._width, self._at, self._word, self._long = width, 0, "", 0

    def add(self, text: str) -> str:
        """What can be shown now."""
        if self._width is None:
            return text
        shown = []
        for character in text:
            if character == "\n":
                shown += [self.end(), "\n"]
                self._at = 0
            elif character.isspace():
                shown += [self.end(), self._space(8 - self._at % 8 if character == "\t" else 1)]
            else:
                wide = cells(character)
                if wide == 2 or self._long + wide > self._width:
                    # a script without spaces, or a word longer than a line
                    shown.append(self.end())
                self._word, self._long = self._word + character, self._long + wide
        return "".join(shown)

    def end(self) -> str:
        """The word that was held back."""
        assert self._width is not None or not self._word
        word, long, self._word, self._long = self._word, self._long, "", 0
        if self._width is not None and self._at and self._at + long > self._width:
            self._at = long
            return "\n" + word
        self._at += long
        return word

    def _space(self, count: int) -> str:
        assert self._width is not None
        if self._at + count > self._width:
            self._at = 0
            return "\n"
        self._at += count
        return " " * count


def speech() -> Words:
    """Words of a model on standard output."""
    return Words(columns(sys.stdout))


def show(text: str) -> None:
    """Print a model's words as they come, without any command to the terminal."""
    if text:
        click.echo(spoken(text), nl=False)


@contextmanager
def progress(
    what: str = "reading", unit: str = "tokens", after: float = 1.0
) -> Iterator[Callable[..., None]]:
    """A callback (done, in all) that draws a bar with the time that is left, gone at the end.

    It comes once ``after`` seconds have passed. Where there is no terminal it is a line every minute.
    """
    bar = _Bar(what, unit, after)
    try:
        yield bar.advance
    finally:
        bar.clear()


class _Bar:
    def __init__(self, what: str, unit: str, after: float) -> None:
        self._what, self._unit, self._after = what, unit, after
        self._start = time.monotonic()
        self._shown, self._told, self._first = 0, 0.0, 0

    def advance(self, done: int, total: int) -> None:
        passed = time.monotonic() - self._start
        left = passed / done * (total - done) if done else None
        said = f"{done:,} of {total:,} {self._unit}" + (f", {span(left)} left" if left is not None else "")
        width = columns(sys.stderr)
        if done >= total:
            self.clear()
        elif width is None:
            if passed - self._told >= _EVERY:
                self._told = passed
                click.echo(f"{self._what}: {said}", err=True)
        elif passed >= self._after:
            # the last column is left free: a terminal would go on to the next line
            room = min(30, width - 1 - len(self._what) - len(said) - 4)
            full = room * done // total
            bar = f"[{'#' * full}{'.' * (room - full)}] " if room >= 5 else ""
            self.clear()
            line = f"{self._what} {bar}{said}"[: width - 1]
            click.echo(f"\r{line}", nl=False, err=True)
            self._shown = len(line)

    def clear(self) -> None:
        if self._shown:
            click.echo(f"\r{' ' * self._shown}\r", nl=False, err=True)
            self._shown = 0


def span(seconds: float) -> str:
    """A time for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02} min" if minutes else f"{rest} s"
