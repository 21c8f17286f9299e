"""One request on its way: what is asked, how far it is, and whom to tell."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.detokenizer import Detokenizer
from ..core.history import History
from ..core.types import Array, Ints
from .channels import Said, Splitter
from .drawing import Drawing
from .failures import Refusal
from .pictures import Sights
from .prefixes import Prefix
from .stops import Stops


@dataclass(frozen=True)
class Prompt:
    """What is read.

    Args:
        ids: token ids (n,), at least one.
        marks: lengths, at which a snapshot is worth keeping, of fewer than all tokens.
        pinned: those of them that end a system prompt.
        owner: whose snapshots may be used (:class:`.prefixes.Prefix`).
        sights: the pictures among the tokens. Such a prompt takes no part in snapshots: tokens do not tell
            one picture from another.
    """

    ids: Ints
    marks: frozenset[int] = frozenset()
    pinned: frozenset[int] = frozenset()
    owner: tuple[str, ...] = ()
    sights: Sights | None = None


@dataclass(frozen=True)
class Likely:
    """A token of the answer, its log probability, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    ``cached`` of the prompt's tokens were read before. ``kv_entries`` (one token in one KV head of one layer)
    are held in ``kv_bytes``.
    """

    prompt: int
    cached: int
    answer: int
    reasoning: int
    kv_entries: int
    kv_bytes: int


@dataclass
class Piece:
    """News of an answer.

    The last one has ``reason``, "stop" or "length", ``usage`` and, if it was asked for, ``shown``, which
    makes what a page shows of the cache; that takes a while, in any thread.
    """

    said: Said
    likely: list[Likely] = field(default_factory=list)
    reason: str | None = None
    usage: Usage | None = None
    shown: Callable[[], dict[str, Any]] | None = None


@dataclass(eq=False)
class Job:
    """What the generation thread works on. Only ``cancelled`` may be set by another thread.

    Args:
        tell: takes each :class:`Piece` and at most one :class:`.failures.Refusal`, which is the end.
        decode: text of token ids.
        top: how many of the likeliest tokens to tell, None for no probabilities.
        budget: of this request alone, None for the server's.
        until: the time (:func:`time.monotonic`) at which it is too late.
        history: takes in what goes of the cache, if that was asked for; ``show`` makes of it, of all tokens
            and of how many a snapshot had read what a page shows.
    """

    prompt: Prompt
    drawing: Drawing
    max_tokens: int
    ends: frozenset[int]
    splitter: Splitter
    tell: Callable[[Piece | Refusal], None]
    decode: Callable[[list[int]], str]
    stops: list[str] = field(default_factory=list)
    top: int | None = None
    budget: int | None = None
    until: float = float("inf")
    history: History | None = None
    show: Callable[[History, list[int], int], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.cancelled = self.over = False
        self.cache: Any = None
        # the snapshot that was made of the cache last, or that it went on from
        self.parent: Callable[[], Any] = _none
        # where there are pictures: reads a chunk, and tells how many tokens are read
        self.looking: Iterator[int] | None = None
        # tokens of the prompt that the cache has read, and those of them that a snapshot had
        self.read = self.cached = 0
        self.answer: list[int] = []
        self.begun = time.monotonic()
        self.prefix = Prefix(self.prompt.owner, self.prompt.ids)
        self._text, self._stops = Detokenizer(self.decode), Stops(self.stops)
        self._reasoning = 0

    @property
    def unread(self) -> int:
        """Tokens still to be read before the last one, with which decoding begins."""
        return len(self.prompt.ids) - 1 - self.read

    def next_end(self, chunk: int) -> int:
        """Where the next chunk ends: at a multiple of the chunk, at a mark, or before the last token.

        Counted from position 0, so that a prompt read from a snapshot is cut as one read from its beginning.
        """
        last = len(self.prompt.ids) - 1
        ends = [mark for mark in self.prompt.marks if self.read < mark]
        return min([(self.read // chunk + 1) * chunk, last, *ends])

    def take(self, token: int, logprobs: Callable[[], Array]) -> Piece:
        """One more token of the answer, and what came of it."""
        self.answer.append(token)
        ended, full = token in self.ends, len(self.answer) == self.max_tokens
        text, stopped = self._stops.add("" if ended else self._text.add(token))
        if (ended or full) and not stopped:
            rest, stopped = self._stops.add(self._text.end())
            text += rest + self._stops.end()
        said = self.splitter.add(text)
        reason = "stop" if ended or stopped else "length" if full else None
        if reason is not None:
            said.add(self.splitter.end())
        self._reasoning += bool(said.reasoning)
        likely = [] if self.top is None or ended else [likeliest(token, logprobs(), self.top)]
        return Piece(said, likely, reason)

    def news(self, piece: Piece) -> None:
        """Tell a piece, unless there is nothing in it."""
        self.over |= piece.reason is not None
        if piece.said or piece.likely or piece.reason:
            self.tell(piece)

    def end(self, refusal: Refusal) -> None:
        """Tell that there will be no more, unless all has been said."""
        self.cache = self.looking = None
        if not self.over:
            self.over = True
            self.tell(refusal)

    def follow(self, cache: Callable[[], Any]) -> None:
        """Take in what has gone of the cache since the last step."""
        if self.history is not None:
            self.history.follow(cache())

    def close(self, piece: Piece, cache: Any) -> None:
        """Put beside the last piece what the answer took, and what is left of its tokens."""
        piece.usage = self.usage(cache)
        if self.history is not None and self.show is not None:
            self.history.follow(cache)
            ids = [*self.prompt.ids.tolist(), *self.answer]
            piece.shown = functools.partial(self.show, self.history, ids, self.cached)

    def usage(self, cache: Any) -> Usage:
        """What the answer took."""
        given = len(self.prompt.ids), self.cached, len(self.answer), self._reasoning
        return Usage(*given, cache.entries, cache.nbytes)


def _none() -> None:
    return None


def likeliest(token: int, logprobs: Array, top: int) -> Likely:
    """A token among log probabilities (V,)."""
    order = np.argsort(-logprobs, kind="stable")[:top]
    return Likely(token, float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in order))
