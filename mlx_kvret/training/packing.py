"""Batches of packed documents, always the same for the same seed, from a position that can be saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..core.pictures import chunk_ends
from ..core.types import Ints, Mask
from ..errors import DataError
from .documents import Document
from .pictures import Shown
from .records import Records


class Position(NamedTuple):
    """How far the data has been read: the piece of the record of the epoch that comes next.

    ``share`` of the record's pieces lie before it.
    """

    epoch: int = 0
    record: int = 0
    piece: int = 0
    share: float = 0.0


@dataclass
class Batch:
    """R rows of at most T tokens; documents lie one behind the other and do not see each other.

    ``ids`` (R, T); ``starts`` (R, T) the place at which the token's document begins; ``position`` (R, T) the
    place within the document, -1 in padding; ``learn`` (R, T) whether the *next* token is to be predicted
    from this one. ``where`` names the documents, ``cut`` counts the pieces that lost what came before them,
    ``shown`` are the pieces with pictures, by row and place.
    """

    ids: Ints
    starts: Ints
    position: Ints
    learn: Mask
    where: list[str] = field(default_factory=list)
    cut: int = 0
    shown: list[Shown] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return int((self.position >= 0).sum())


def in_rows(batch: Batch, rows: Sequence[int]) -> list[Shown]:
    """The pieces with pictures in some rows of a batch, with their places among these."""
    return [replace(one, row=rows.index(one.row)) for one in batch.shown if one.row in rows]


class Packer:
    """Documents in random order, cut into pieces of at most ``length`` tokens, packed into batches.

    A piece goes into the first row with room; the first one that fits nowhere opens the next batch.

    Args:
        read: a record's number to its document, or None if it is to be skipped.
        length: T. ``rows``: R, the rows of a batch over all processes.
        epochs: passes over the data; None for endless ones.
        alone: one piece to a row, for models that cannot keep documents apart.
    """

    def __init__(
        self,
        records: Records,
        read: Callable[[int], Document | None],
        length: int,
        rows: int,
        seed: int,
        epochs: int | None,
        alone: bool = False,
    ):
        self._records, self._read, self._seed = records, read, seed
        self.length, self.rows, self.epochs, self.alone = length, rows, epochs, alone
        self.position = Position()

    def progress(self) -> float:
        """The share of all epochs that has been read; 0 if they are endless."""
        if self.epochs is None:
            return 0.0
        epoch, record, _, share = self.position
        return (epoch + (record + share) / len(self._records)) / self.epochs

    def batch(self) -> Batch | None:
        """The next batch, or None when all epochs are over."""
        rows: list[list[tuple[Document, slice]]] = [[] for _ in range(self.rows)]
        room = np.full(self.rows, self.length)
        for position, document, piece in self._pieces():
            size = piece.stop - piece.start
            fitting = np.flatnonzero(room >= size)
            if not fitting.size:
                self.position = position
                break
            rows[fitting[0]].append((document, piece))
            room[fitting[0]] -= self.length if self.alone else size
        else:
            self.position = Position(self.epochs or 0)
        return self._lay_out(rows) if any(rows) else None

    def _pieces(self) -> Iterator[tuple[Position, Document, slice]]:
        """Every piece from the current position on, with its own position."""
        epoch, first, skip, _ = self.position
        while self.epochs is None or epoch < self.epochs:
            found = first > 0
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._records))
            for number in range(first, len(order)):
                document = self._read(int(order[number]))
                if document is None:
                    continue
                found = True
                pieces = self._cut(document)
                for place in range(skip, len(pieces)):
                    yield Position(epoch, number, place, place / len(pieces)), document, pieces[place]
                skip = 0
            if not found:
                raise DataError("every record of the training data was skipped; check the data")
            epoch, first, skip = epoch + 1, 0, 0

    def _cut(self, document: Document) -> list[slice]:
        """Pieces that cut no picture."""
        ends = chunk_ends(len(document.ids), self.length, document.spans)
        pieces = [slice(a, b) for a, b in itertools.pairwise([0, *ends])]
        # a single token at the end predicts nothing
        return pieces[:-1] if pieces[-1].stop - pieces[-1].start == 1 else pieces

    def _lay_out(self, rows: list[list[tuple[Document, slice]]]) -> Batch:
        used = max(sum(piece.stop - piece.start for _, piece in pieces) for pieces in rows)
        shape = (self.rows, used)
        batch = Batch(
            np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, bool)
        )
        for row, pieces in enumerate(rows):
            begin = 0
            for document, piece in pieces:
                end = begin + piece.stop - piece.start
                batch.ids[row, begin:end] = document.ids[piece]
                batch.starts[row, begin:end] = begin
                batch.position[row, begin:end] = np.arange(end - begin)
                batch.learn[row, begin : end - 1] = document.learn[piece][1:]
                batch.where.append(document.where)
                batch.cut += piece.start > 0
                if (seen := _shown(document, piece, row, begin)) is not None:
                    batch.shown.append(seen)
                begin = end
            batch.starts[row, begin:] = begin
        return batch


def _shown(document: Document, piece: slice, row: int, begin: int) -> Shown | None:
    """A piece with pictures; None without."""
    own = [(a - piece.start, b - piece.start) for a, b in document.spans if piece.start <= a < piece.stop]
    if not own:
        return None
    earlier = [b - a for a, b in document.spans if a < piece.start]
    ids = document.ids[piece]
    told = document.pixels, sum(earlier), len(earlier), document.ids, piece.start
    return Shown(row, begin, ids, tuple(own), *told)
