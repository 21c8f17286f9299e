"""Samples from local files of public benchmarks with pictures: MMStar, MathVista and MMDU.

MMStar (arXiv 2403.20330) is scored by the letter. MathVista (arXiv 2310.02255) has a model find the answer
in what was said; here rules do. MMDU (arXiv 2406.11833) is judged by a model; here it is measured how
likely its own answers are, in nats per token, which needs no judge. So figures compare policies with each
other, not with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ConfigError
from .picture_files import bitmap, picture_rows
from .picture_writer import Part, PictureWriter
from .readers import Row
from .samples import Question, Sample

_LETTERS = "ABCDEFGH"
_HERE = "<ImageHere>"


def mmstar(path: Path, writer: PictureWriter) -> Iterator[Sample]:
    """``question`` with its options (or these in columns ``A`` to ``D``), ``image``, ``answer``: a
    letter."""
    for row in picture_rows(path, "question", "image", "answer"):
        wanted = row.text("answer").strip().upper()
        if len(wanted) != 1 or wanted not in _LETTERS:
            raise row.error(f"answer is {wanted!r:.20}, expected a letter")
        given = [name for name in _LETTERS if isinstance(row.fields.get(name), str) and row.text(name)]
        asked = row.text("question") + "".join(f"\n{name}: {row.text(name)}" for name in given)
        asked += "\nAnswer with the letter of the right option only."
        choices = tuple(row.text(name) for name in given)
        question = Question((), (), (wanted,), "letter", 16, choices=choices)
        yield writer.sample([bitmap(row, "image", path.parent)], asked, question)


def mathvista(path: Path, writer: PictureWriter) -> Iterator[Sample]:
    """``query`` (or ``question``), ``choices``, ``answer``, ``question_type``, ``answer_type``,
    ``precision``, and the picture in ``decoded_image`` or ``image``."""
    for row in picture_rows(path, "question", "image", "answer", "question_type", "answer_type"):
        if not row.text("answer").strip():
            raise row.error(
                "it has no answer, as in the split test, whose answers are not public; take testmini"
            )
        shown = "decoded_image" if row.fields.get("decoded_image") else "image"
        yield writer.sample([bitmap(row, shown, path.parent)], *_mathvista(row))


def mmdu(path: Path, writer: PictureWriter) -> Iterator[Sample]:
    """``image``: a list of paths; ``conversations``: questions and answers in turn, ``<ImageHere>`` where a
    picture stands. All in one cache, with the record's own answers as history."""
    for row in picture_rows(path, "image", "conversations"):
        pictures, told = iter(row.texts("image")), row.fields["conversations"]
        if (
            not isinstance(told, list)
            or not told
            or len(told) % 2
            or not all(isinstance(t, dict) for t in told)
        ):
            raise row.error("conversations is not a list of questions and answers in turn")
        turns = [Row(turn, row.where) for turn in told]
        said = []
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            parts: list[Part] = []
            for index, piece in enumerate(asked.text("value").split(_HERE)):
                if index:
                    if (name := next(pictures, None)) is None:
                        raise row.error(f"there are more {_HERE} than pictures")
                    parts.append(bitmap(row, "image", path.parent, name))
                parts += [piece.strip()] if piece.strip() else []
            said.append((parts, answered.text("value")))
        yield writer.dialogue(said)


READERS: dict[str, Callable[[Path, PictureWriter], Iterator[Sample]]] = {
    "mmstar": mmstar,
    "mathvista": mathvista,
    "mmdu": mmdu,
}
LIKELIHOODS = ("mmdu",)


def _mathvista(row: Row) -> tuple[str, Question]:
    choices, wanted = row.texts("choices"), row.text("answer").strip()
    asked = row.text("query") if isinstance(row.fields.get("query"), str) else row.text("question")
    if row.text("question_type") == "multi_choice":
        if wanted not in choices or len(choices) > len(_LETTERS):
            raise row.error(f"answer {wanted!r:.40} is not among its {len(choices)} choices")
        if not re.search(r"\(A\)", asked):
            asked += "\n" + "\n".join(f"({_LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
        asked += "\nAnswer with the letter of the right option only."
        letter = _LETTERS[choices.index(wanted)]
        return asked, Question((), (), (letter,), "letter", 16, choices=tuple(choices))
    kind = row.text("answer_type")
    if kind in ("integer", "float"):
        try:
            float(wanted)
            digits = 0 if kind == "integer" else int(float(row.text("precision") or 0))
        except (ValueError, ConfigError) as error:
            raise row.error(
                f"answer {wanted!r:.40} of type {kind} is no number, or has no precision"
            ) from error
        asked += "\nAnswer with the number only."
        return asked, Question((), (), (wanted,), "number", 32, digits=digits)
    return asked + "\nAnswer in a few words.", Question((), (), (wanted,), "any", 32)
