"""Pictures of training records: where they stand in the messages, and which tokens of a document they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.images import Image, open_picture, path_of
from ..core.picture_prompts import COMMON_MARK, source_of
from ..core.pictures import runs
from ..core.types import Ints, Mask
from ..errors import ConfigError, DataError


class Sees(Protocol):
    """What a base model makes of pictures: ``tokens`` stand for them.

    Called with a rendered text and its pictures it gives ``input_ids`` (1, n) and what its tower is given.
    """

    tokens: frozenset[int]

    def __call__(self, text: str, pictures: Sequence[Image]) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Shown:
    """A piece of a document with pictures: it stands in a batch's row ``row`` from place ``begin`` on.

    ``ids`` (n,) are its tokens, ``spans`` its pictures among them; of the document's ``pixels`` ``before``
    tokens in ``earlier`` pictures belong to pieces before it. The whole ``document`` (N,) has it from token
    ``start`` on.
    """

    row: int
    begin: int
    ids: Ints
    spans: tuple[tuple[int, int], ...]
    pixels: Mapping[str, Any]
    before: int
    earlier: int
    document: Ints
    start: int = 0


@dataclass(frozen=True)
class Inputs:
    """What a decoder is ``given``; ``ends`` (R, T) of each token's sight, where pictures are seen whole."""

    given: dict[str, Any]
    ends: Any


def places_of(starts: Ints) -> Ints:
    """Each token's place in its document, given ``starts`` (R, T): where the document begins."""
    return np.arange(starts.shape[1]) - starts


def ends_of(starts: Ints, shown: Sequence[Shown]) -> Ints:
    """One past the last token that each of a batch's tokens (R, T) sees where pictures are seen whole."""
    ends = np.broadcast_to(np.arange(1, starts.shape[1] + 1), starts.shape).copy()
    for piece in shown:
        for a, b in piece.spans:
            ends[piece.row, piece.begin + a : piece.begin + b] = piece.begin + b
    return ends


def placed(
    messages: list[dict[str, Any]], images: object, where: str
) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Messages whose pictures are bare parts, ``{"type": "image"}``, and the pictures in their order.

    ``<image>`` in a text is such a part if the record has ``images``, which fill parts without a picture.

    Raises:
        DataError: there are more or fewer of them than parts.
    """
    if images is not None and not isinstance(images, list):
        raise DataError(f"{where}: images is {images!r:.40}; expected a list of files")
    made = list[dict[str, Any]]()
    try:
        rest = [source_of({"image": one}, f"images[{n}]") for n, one in enumerate(images or ())]
        found = list[Any]()
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str) and rest and COMMON_MARK in content:
                content = _parts(content)
            if isinstance(content, list):
                pictures = [part for part in content if part.get("type") == "image"]
                found += [source_of(part, f"message {number}") for part in pictures]
                content = [{"type": "image"} if part.get("type") == "image" else part for part in content]
            made.append(message | {"content": content} if content is not None else message)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error
    places = sum(own is None for own in found)
    if places != len(rest):
        raise DataError(
            f"{where} has {len(rest)} images and {places} places for them; give one for each "
            f'{{"type": "image"}} part or {COMMON_MARK} in its messages'
        )
    filled = iter(rest)
    return made, tuple(next(filled) if own is None else own for own in found)


def _parts(text: str) -> list[dict[str, Any]]:
    """A text as parts, with a picture at each of its marks."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(COMMON_MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def check_files(images: Sequence[Any], folder: Path, where: str) -> int:
    """Refuse pictures that are not there; returns the bytes of their files.

    Raises:
        DataError: names the picture.
    """
    size = 0
    for number, image in enumerate(images):
        if isinstance(image, str) and not image.lower().startswith("data:"):
            try:
                path = path_of(image, f"image {number}", folder)
            except ConfigError as error:
                raise DataError(f"{where}: {error}") from error
            if not path.is_file():
                raise DataError(f"{where}: there is no file {path} (image {number}); mend its path")
            size += path.stat().st_size
    return size


def opened(images: Sequence[Any], folder: Path | None, where: str) -> list[Image]:
    """The pictures of a record, whose relative paths are relative to its file.

    Raises:
        DataError: one cannot be read.
    """
    try:
        return [open_picture(one, f"image {n}", folder) for n, one in enumerate(images)]
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error


def spread(
    learn: Mask, before: Sequence[int], after: Sequence[int], marks: frozenset[int], where: str
) -> Mask:
    """Which tokens are learnt once each mark of a picture has become many tokens, which never are.

    Args:
        learn: which of the tokens ``before`` are, in which a token of ``marks`` stands for each picture.
        after: the tokens with as many in its place as the picture has.

    Raises:
        DataError: beside the pictures the two are not the same.
    """
    short, long = np.asarray(before), np.asarray(after)
    found, at = np.zeros(len(long), bool), 0
    shown = np.isin(long, sorted(marks))
    begin = 0
    for a, b in [*runs(before, marks), (len(short), len(short))]:
        text = short[begin:a]
        place = _place(long, text, at) if len(text) else at
        if place is None or (begin and len(text) and not shown[at:place].any()):
            raise DataError(
                f"{where}: the model's processor changes the text beside its pictures, so that what the "
                "assistant said cannot be found; use --loss all"
            )
        found[place : place + len(text)] = learn[begin:a]
        begin, at = b, place + len(text)
    return found & ~shown


def _place(long: Ints, text: Ints, start: int) -> int | None:
    """Where a run of tokens stands first, from ``start`` on."""
    if start + len(text) > len(long):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(long[start:], len(text))
    hits = np.flatnonzero((windows == text).all(1))
    return start + int(hits[0]) if hits.size else None
