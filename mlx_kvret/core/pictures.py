"""Where a stream of tokens holds pictures: positions, modalities, and where a chunk may end.

A token's *index* is its place in the stream (0-based); ages, eviction and ``kept_positions`` count by it. Its
*rotary position* may lag behind: models with M-RoPE give a picture of h x w tokens max(h, w) positions only.
A cache owns the pictures it has seen, and so the position of whatever comes next.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import numpy as np

from ..errors import CacheError, CheckpointError, ConfigError, UnsupportedFeatureError
from .types import Ints, Mask

Modality = Literal["text", "picture"]
MODALITIES = ("text", "picture")
# what models call the types of their tokens: 0 is text
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Picture:
    """Tokens ``start`` to ``end`` - 1 of the stream are one picture.

    ``rows`` x ``columns`` are its patches as tokens, row by row, 0 x 0 where that is not known. ``advance``
    is how many rotary positions it takes: as many as tokens, unless the model has M-RoPE.
    """

    start: int
    end: int
    rows: int = 0
    columns: int = 0
    advance: int = 0

    @property
    def tokens(self) -> int:
        return self.end - self.start


Pictures = tuple[Picture, ...]


def next_position(pictures: Iterable[Picture], seen: int) -> int:
    """The rotary position of the token that comes after ``seen`` others.

    Raises:
        CacheError: the last picture has not been read to its end.
    """
    position = seen
    for picture in pictures:
        if picture.end > seen:
            raise CacheError(
                f"the cache has read {seen - picture.start} of the {picture.tokens} tokens of a picture; "
                "read the rest of it first, or make a new cache"
            )
        position -= picture.tokens - picture.advance
    return position


def forgotten(pictures: Pictures, seen: int) -> Pictures:
    """The pictures that are left when only the first ``seen`` tokens are.

    Raises:
        UnsupportedFeatureError: one of them would be cut in two.
    """
    for picture in pictures:
        if picture.start < seen < picture.end:
            raise UnsupportedFeatureError(
                f"cannot take back tokens {seen} to {picture.end - 1}: a picture stands at "
                f"{picture.start} to {picture.end - 1}, and is kept or forgotten as a whole"
            )
    return tuple(picture for picture in pictures if picture.end <= seen)


def runs(ids: Sequence[int], tokens: Collection[int], start: int = 0) -> list[tuple[int, int]]:
    """Runs of ``ids`` that are picture tokens, as (first, one past the last), counted from ``start``."""
    marked = np.isin(np.asarray(ids, np.int64), np.asarray(sorted(tokens), np.int64))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(start + int(a), start + int(b)) for a, b in edges.reshape(-1, 2)]


def joined(pictures: Pictures, found: Iterable[tuple[int, int]]) -> Pictures:
    """Pictures seen, and those at ``found`` among the tokens that come after, one position for each token.

    One that begins where the last one ends is the rest of it.
    """
    known = list(pictures)
    for start, end in found:
        if known and known[-1].end == start:
            start = known.pop().start
        known.append(Picture(start, end, advance=end - start))
    return tuple(known)


def chunk_ends(length: int, step: int, pictures: Iterable[tuple[int, int]]) -> list[int]:
    """Where the chunks of ``length`` tokens end, each of at most ``step``, so that no picture is cut.

    ``pictures`` are (start, end) pairs from 0. A picture that is longer than a step is a chunk of its own.
    """
    ends, at = list[int](), 0
    spans = sorted(pictures)
    while at < length:
        end = min(at + step, length)
        for a, b in spans:
            if a < end < b:
                # before the picture; if the chunk begins with it, after
                end = a if a > at else b
        ends.append(end)
        at = end
    return ends


def check_text(ids: Iterable[int], eyes: Collection[int]) -> None:
    """Refuse the tokens ``eyes`` of pictures where there are no pictures.

    Raises:
        ConfigError: says how many there are.
    """
    if count := sum(one in eyes for one in ids):
        raise ConfigError(
            f"the prompt holds {count} tokens that stand for pictures, and there are none; give images, or "
            "what the processor makes of text and pictures"
        )


def check_finite(finite: bool) -> None:
    """Refuse pictures of which a tower did not make numbers.

    Raises:
        UnsupportedFeatureError: which is mended by another type, or by other pictures.
    """
    if not finite:
        raise UnsupportedFeatureError(
            "the model's vision tower makes infinite or no numbers of these pictures; load the model in "
            "bfloat16 or float32, whose range is larger than float16's, or give smaller pictures"
        )


class InChunks(abc.ABC):
    """A prompt with pictures that is read in passes, none of which cuts a picture.

    ``last`` is the index of the last token, ``until`` that of the first token which is not read in chunks,
    ``spans`` are the (start, end) of pictures.
    """

    last: int
    until: int
    spans: Sequence[tuple[int, int]]

    def read(self, cache: Any, step: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Read all up to ``until``; ``progress`` is told the tokens read and those of the whole prompt."""
        if progress is not None and self.until:
            progress(0, self.last + 1)
        for end in self.chunks(cache, step):
            if progress is not None and end < self.until:
                progress(end, self.last + 1)

    def chunks(self, cache: Any, step: int) -> Iterator[int]:
        """As :meth:`read`, by turns: after each chunk how many tokens are read."""
        start = 0
        for end in chunk_ends(self.until, step, self.spans):
            self.one_pass(start, end, cache)
            start = end
            yield end

    def finish(self, cache: Any) -> Any:
        """Read the rest; returns the logits of the last token."""
        return self.one_pass(self.until, self.last + 1, cache)

    @abc.abstractmethod
    def one_pass(self, start: int, end: int, cache: Any) -> Any:
        """Read tokens ``start`` to ``end`` - 1; returns their logits."""


def is_picture(pictures: Iterable[Picture], seen: int) -> Mask:
    """For each of ``seen`` tokens whether it is a picture's, (seen,)."""
    mask = np.zeros(seen, bool)
    for picture in pictures:
        mask[picture.start : picture.end] = True
    return mask


def of_modality(kept: list[list[Ints]], pictures: Iterable[Picture], modality: Modality) -> list[list[Ints]]:
    """Of the kept positions (by layer, by head) those of text or those of pictures."""
    last = max((int(head[-1]) for layer in kept for head in layer if len(head)), default=-1)
    marked = is_picture(pictures, last + 1) == (modality == "picture")
    return [[head[marked[head]] for head in layer] for layer in kept]


def to_array(pictures: Sequence[Picture]) -> Ints:
    """(P, 5) int32: start, end, rows, columns, advance."""
    return np.array([astuple(picture) for picture in pictures], np.int32).reshape(-1, 5)


def from_array(found: Ints, seen: int) -> Pictures:
    """Back from :func:`to_array`, checked against the number of tokens seen.

    Raises:
        CheckpointError: they overlap, are out of order, end after ``seen``, or have impossible sizes.
    """
    if found.ndim != 2 or found.shape[1] != 5 or found.dtype != np.int32:
        raise CheckpointError(f"pictures is {found.dtype} of shape {found.shape}, expected int32 (P, 5)")
    pictures, before = [], 0
    for row in found.tolist():
        picture = Picture(*row)
        fits = before <= picture.start < picture.end <= seen
        sized = min(picture.rows, picture.columns) >= 0 and picture.advance >= 1
        if not fits or not sized or picture.rows * picture.columns not in (0, picture.tokens):
            raise CheckpointError(f"a picture is told to be {picture}, of {seen} tokens")
        pictures.append(picture)
        before = picture.end
    return tuple(pictures)
