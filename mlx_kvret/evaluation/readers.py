"""Samples from local files of public benchmarks, and pieces of a plain text for perplexity.

LongBench's and RULER's JSON lines (arXiv 2308.14508, 2404.06654), LongMemEval's JSON (arXiv 2410.10813).
Scores are word overlap or inclusion, prompts are ours: they compare policies with each other, not with
published figures (LongMemEval's are judged by a model).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .samples import Metric, Sample, Turn
from .writer import Piece, Writer


def longbench(path: Path, writer: Writer) -> Iterator[Sample]:
    """``context``, ``input``, ``answers`` and, for classification, ``all_classes``."""
    for row in json_lines(path, "context", "input", "answers"):
        answers, classes = _texts(row["answers"], path), row.get("all_classes")
        asked = f"\n\n{row['input']}\nAnswer in a few words."
        asked += f" One of: {', '.join(classes)}." if classes else ""
        metric: Metric = "any" if classes else "f1"
        yield writer.sample([Piece(row["context"])], f"{asked}\nAnswer:", answers, metric, 64)


def ruler(path: Path, writer: Writer) -> Iterator[Sample]:
    """``input`` (its last line is the question), ``outputs`` and ``answer_prefix`` where there is one."""
    for row in json_lines(path, "input", "outputs"):
        text, newline, question = row["input"].rstrip().rpartition("\n")
        outputs = _texts(row["outputs"], path)
        yield writer.sample(
            [Piece(text)], newline + question + row.get("answer_prefix", ""), outputs, "all", 128
        )


def longmemeval(path: Path, writer: Writer) -> Iterator[Sample]:
    """``haystack_sessions``, all in one cache, then ``question``; useful turns have ``has_answer``."""
    names = ("question", "answer", "haystack_sessions")
    for row in _checked(_json(path), path, names):
        dates = row.get("haystack_dates") or [""] * len(row["haystack_sessions"])
        pieces = []
        for date, session in zip(dates, row["haystack_sessions"], strict=True):
            pieces.append(Piece(f"\nConversation {date}".rstrip() + "\n"))
            pieces += [
                Piece(f"{turn['role']}: {turn['content']}\n", bool(turn.get("has_answer")))
                for turn in session
            ]
        asked = f"\nQuestion: {row['question']}\nAnswer in a few words.\nAnswer:"
        yield writer.sample(pieces, asked, [str(row["answer"])], "f1", 64)


def text(path: Path, writer: Writer, length: int) -> Iterator[Sample]:
    """Consecutive pieces of ``length`` tokens, each predicted in a cache of its own; a rest is left out."""
    try:
        ids = writer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
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


def json_lines(path: Path, *names: str) -> Iterator[dict[str, Any]]:
    """The records of a JSON lines file, each with all of the named fields.

    Raises:
        ConfigError: says which line is broken or lacks what.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ConfigError(
                        f"{path}, line {number}: not JSON ({error}); mend or remove it"
                    ) from error
                yield from _checked([row], f"{path}, line {number}", names)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _json(path: Path) -> list[Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(data, list):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected a list of records")
    return data


def _checked(rows: list[Any], where: Path | str, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        place = f"{where}, record {number}" if isinstance(where, Path) else where
        missing = [name for name in names if not isinstance(row, dict) or name not in row]
        if missing:
            raise ConfigError(f"{place}: no {', '.join(missing)}; expected {', '.join(names)}")
        yield row


def _texts(value: Any, path: Path) -> list[str]:
    texts = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    if not texts:
        raise ConfigError(f"{path}: a record has no answer; remove it")
    return texts
