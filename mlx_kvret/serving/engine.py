"""Rows that decode together. Here one after the other: the naive twin of :mod:`.batched`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .backend import Backend, Choose


class Step(NamedTuple):
    """A row's next token, which its cache has read, and the log probabilities (V,) it was chosen from."""

    row: int
    token: int
    logprobs: Any


class Engine(Protocol):
    """Decodes the rows that are in it. Who decides when a row ends is the caller.

    ``leaving`` says that the process is to end, whoever says so.
    """

    leaving: bool

    def join(self, cache: Any, token: int, choose: Choose) -> int:
        """A new row, whose cache has read all of its prompt but the last token; its number."""

    def step(self) -> list[Step]:
        """One token of each row that has one ready."""

    def leave(self, row: int) -> Any:
        """Take a row out; its cache, which holds the prompt and every token that was given out."""

    def look(self, row: int) -> Any:
        """A row's cache, to be looked at before the next step."""

    def reset(self) -> None:
        """Drop all rows, after a step that failed."""

    def close(self) -> None:
        """Drop all rows; there will be no more."""


@dataclass
class _Row:
    cache: Any
    decode: Callable[[Any], Any]
    choose: Choose
    logprobs: Any
    token: Any


class OneByOne:
    """As :class:`Engine`: a forward pass for each row."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._rows: dict[int, _Row] = {}
        self._count, self.leaving = 0, False

    def join(self, cache: Any, token: int, choose: Choose) -> int:
        decode = self._backend.decoder(cache)
        logprobs = decode(self._backend.array(token))
        self._count += 1
        self._rows[self._count] = _Row(cache, decode, choose, logprobs, choose(logprobs))
        return self._count

    def step(self) -> list[Step]:
        steps = []
        for number, row in self._rows.items():
            steps.append(Step(number, int(row.token), row.logprobs[0]))
            row.logprobs = row.decode(row.token)
            row.token = row.choose(row.logprobs)
        return steps

    def leave(self, row: int) -> Any:
        return self._rows.pop(row).cache

    def look(self, row: int) -> Any:
        return self._rows[row].cache

    def reset(self) -> None:
        self._rows.clear()

    close = reset
