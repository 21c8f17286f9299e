"""Samples from local files of public benchmarks, and pieces of a plain text for perplexity.

LongBench's and RULER's JSON lines (arXiv 2308.14508, 2404.06654), LongMemEval's JSON (arXiv 2410.10813).
Scores are word overlap or inclusion, prompts are ours: they compare policies with each other, not with
published figures (LongMemEval's are judged by a model).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.reading import parse_json, read_bytes
from ..errors import CheckpointError, ConfigError
from .samples import Metric, Sample, Turn
from .writer import Piece, Writer


def longbench(path: Path, writer: Writer) -> Iterator[Sample]:
    """``context``, ``input``, ``answers`` and, for classification, ``all_classes``."""
    for row in json_lines(path, "context", "input", "answers"):
        answers, classes = row.answers("answers"), row.texts("all_classes")
        asked = f"\n\n{row.text('input')}\nAnswer in a few words."
        asked += f" One of: {', '.join(classes)}." if classes else ""
        metric: Metric = "any" if classes else "f1"
        yield writer.sample([Piece(row.text("context"))], f"{asked}\nAnswer:", answers, metric, 64)


def ruler(path: Path, writer: Writer) -> Iterator[Sample]:
    """``input`` (its last line is the question), ``outputs`` and ``answer_prefix`` where there is one."""
    for row in json_lines(path, "input", "outputs"):
        text, newline, question = row.text("input").rstrip().rpartition("\n")
        asked = newline + question + (row.text("answer_prefix") if "answer_prefix" in row.fields else "")
        yield writer.sample([Piece(text)], asked, row.answers("outputs"), "all", 128)


def longmemeval(path: Path, writer: Writer) -> Iterator[Sample]:
    """``haystack_sessions``, all in one cache, then ``question``; useful turns have ``has_answer``."""
    for row in _records(path, "question", "answer", "haystack_sessions"):
        sessions = row.objects("haystack_sessions")
        dates = row.texts("haystack_dates") or [""] * len(sessions)
        if len(dates) != len(sessions):
            raise row.error(f"has {len(dates)} dates for {len(sessions)} sessions")
        pieces = []
        for date, session in zip(dates, sessions, strict=True):
            pieces.append(Piece(f"\nConversation {date}".rstrip() + "\n"))
            pieces += [
                Piece(f"{turn.text('role')}: {turn.text('content')}\n", bool(turn.fields.get("has_answer")))
                for turn in session
            ]
        asked = f"\nQuestion: {row.text('question')}\nAnswer in a few words.\nAnswer:"
        yield writer.sample(pieces, asked, row.answers("answer"), "f1", 64)


def text(path: Path, writer: Writer, length: int) -> Iterator[Sample]:
    """Consecutive pieces of ``length`` tokens, each predicted in a cache of its own; a rest is left out."""
    try:
        ids = writer.encode(read_file(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path} as text: {error}") from error
    own = length - len(writer.before)
    if len(ids) < own or own < 2:
        raise ConfigError(f"{path} has {len(ids)} tokens; {length} or more are needed, lower the length")
    for start in range(0, len(ids) - own + 1, own):
        yield Sample((Turn(writer.before + ids[start : start + own], scored=True),))


def texts(paths: Sequence[Path], writer: Writer, length: int, rng: np.random.Generator) -> Iterator[Sample]:
    """Pieces as of :func:`text` of several files, drawn from them in turn, in random order within each."""
    drawn = []
    for path in paths:
        pieces = list(text(path, writer, length))
        drawn.append([pieces[i] for i in rng.permutation(len(pieces))])
    for turn in itertools.zip_longest(*drawn):
        yield from (piece for piece in turn if piece is not None)


READERS: dict[str, Callable[[Path, Writer], Iterator[Sample]]] = {
    "longbench": longbench,
    "ruler": ruler,
    "longmemeval": longmemeval,
}


@dataclass(frozen=True)
class Row:
    """A record's fields, and ``where`` it stands."""

    fields: dict[str, Any]
    where: str

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.where}: {what}; mend or remove it")

    def text(self, name: str) -> str:
        """A text; a number counts as one.

        Raises:
            ConfigError: it is something else.
        """
        return self._text(name, self.fields.get(name))

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty if there is none. Raises as :meth:`text`."""
        found = self.fields.get(name)
        if found is None:
            return []
        if not isinstance(found, list):
            raise self.error(f"{name} is a {type(found).__name__}, expected a list of texts")
        return [self._text(name, item) for item in found]

    def answers(self, name: str) -> list[str]:
        """A text or a list of texts, at least one. Raises as :meth:`text`."""
        found = self.texts(name) if isinstance(self.fields.get(name), list) else [self.text(name)]
        if not found or not all(answer.strip() for answer in found):
            raise self.error("a record has no answer, or an empty one")
        return found

    def objects(self, name: str) -> list[list[Row]]:
        """A list of lists of objects. Raises as :meth:`text`."""
        found = self.fields.get(name)
        lists = isinstance(found, list) and all(isinstance(inner, list) for inner in found)
        if not lists or not all(isinstance(item, dict) for inner in found for item in inner):  # type: ignore[union-attr]
            raise self.error(f"{name} is {found!r:.60}, expected a list of lists of objects")
        return [[Row(item, f"{self.where}, {name}") for item in inner] for inner in found]  # type: ignore[union-attr]

    def _text(self, name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise self.error(f"{name} is {value!r:.60}, expected a text")


def json_lines(path: Path, *names: str) -> Iterator[Row]:
    """The records of a JSON lines file, each with all of the named fields.

    Raises:
        ConfigError: says which line is broken or lacks what.
    """
    for number, line in enumerate(read_file(path).split(b"\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error}); mend or remove it") from error
        yield _row(row, where, names)


def _records(path: Path, *names: str) -> Iterator[Row]:
    """As :func:`json_lines`, from a file that is one list."""
    try:
        data = parse_json(read_file(path))
    except ValueError as error:
        raise ConfigError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(data, list):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected a list of records")
    for number, row in enumerate(data, 1):
        yield _row(row, f"{path}, record {number}", names)


def read_file(path: Path) -> bytes:
    """The bytes of a file of usual size; raises ConfigError."""
    try:
        return read_bytes(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _row(row: Any, where: str, names: tuple[str, ...]) -> Row:
    missing = [name for name in names if not isinstance(row, dict) or name not in row]
    if missing:
        raise ConfigError(f"{where}: no {', '.join(missing)}; expected {', '.join(names)}")
    return Row(row, where)
