"""What a task is made of: texts that are read, questions after them, and how answers score."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..bitmap import Bitmap
from .answers import letter, same_number

Metric = Literal["exact", "all", "any", "f1", "letter", "number"]


@dataclass(frozen=True)
class Question:
    """Asked on a copy of the cache, so that no question sees another.

    Attributes:
        ids: tokens of the question.
        answer: the very tokens that must come (metric ``exact``); nothing is generated for these.
        references: texts to be found in what the model generates, for the other metrics.
        metric: ``all``: share of the references found; ``any``: one is enough; ``f1``: best word overlap;
            ``letter``: the chosen one of ``choices``; ``number``: equal to ``digits`` decimals.
        max_tokens: the most tokens to generate.
        useful: positions in the text that hold the answer, where the task knows them.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    metric: Metric = "exact"
    max_tokens: int = 32
    useful: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()
    digits: int = 0


@dataclass(frozen=True)
class Turn:
    """Tokens that enter the cache, then questions about all that was read so far.

    ``scored`` turns are for perplexity: every token but the text's first is predicted. ``pictures`` stand
    where ``ids`` hold the model's image tokens, as many for each as the model makes of it.
    """

    ids: tuple[int, ...]
    questions: tuple[Question, ...] = ()
    scored: bool = False
    pictures: tuple[Bitmap, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One text in one cache; most have one turn."""

    turns: tuple[Turn, ...]

    @property
    def tokens(self) -> int:
        return sum(len(turn.ids) for turn in self.turns)

    @property
    def sees(self) -> bool:
        """Whether there are pictures in it."""
        return any(turn.pictures for turn in self.turns)

    @property
    def useful(self) -> tuple[int, ...]:
        """Positions that hold the answer to any question, ascending."""
        return tuple(sorted({p for turn in self.turns for q in turn.questions for p in q.useful}))

    @property
    def shape(self) -> tuple[tuple[int, bool], ...]:
        """Samples of equal shape can be read side by side."""
        return tuple((len(turn.ids), turn.scored) for turn in self.turns)


def batches(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Places of samples that are read side by side: of equal shape, ``size`` at most."""
    by_shape: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        by_shape.setdefault(sample.shape, []).append(place)
    return [places[i : i + size] for places in by_shape.values() for i in range(0, len(places), size)]


def text_score(question: Question, text: str) -> float:
    """How well a generated text answers, from 0 to 1."""
    if question.metric == "f1":
        return max(word_f1(text, reference) for reference in question.references)
    if question.metric == "letter":
        return float(letter(text, question.choices) == question.references[0])
    if question.metric == "number":
        return float(same_number(text, question.references[0], question.digits))
    said = text.lower()
    found = [reference.lower() in said for reference in question.references]
    return float(any(found)) if question.metric == "any" else sum(found) / len(found)


def word_f1(text: str, reference: str) -> float:
    """F1 of the words in common, without case, punctuation and articles (as SQuAD, arXiv 1606.05250)."""
    said, wanted = _words(text), _words(reference)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
