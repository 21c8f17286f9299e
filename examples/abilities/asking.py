"""Facts asked for after a text: answered in words, chosen among alternatives, and how surprising they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_kvret.evaluation.likelihood import log_likelihoods

from .facts import Asked

# in the model's own words; greedily, once it is begun; the likeliest of seven; nats per token of the value
ANSWERED, COMPLETED, CHOSEN, NATS = "answered", "completed", "chosen", "nats"
NAMES = (ANSWERED, COMPLETED, CHOSEN, NATS)
Scores = dict[str, float]


def ask_reading(reading: Any, asked: Sequence[Sequence[Asked]]) -> list[list[Scores]]:
    """Every question of every text of a :class:`~mlx_kvret.evaluation.reading.Reading`, each as if alone."""
    answered = reading.ask([[one.question for one in row] for row in asked])
    logits = reading.follow([[list(one.ids) for one in row] for row in asked])
    return [
        [score(one, logits[r, i, : len(one.ids)]) | {ANSWERED: answered[r][i]} for i, one in enumerate(row)]
        for r, row in enumerate(asked)
    ]


def ask_cache(engine: Any, cache: Any, asked: Sequence[Asked]) -> list[Scores]:
    """The same of a :class:`~mlx_kvret.evaluation.engine.PublicEngine` and a cache that has read a text."""
    found = []
    for one in asked:
        said = engine.answer(one.question.ids, copy.deepcopy(cache), one.question.max_tokens)
        right = float(one.question.references[0].lower() in said.lower())
        found.append(score(one, engine.forward(one.ids, copy.deepcopy(cache))) | {ANSWERED: right})
    return found


def score(one: Asked, logits: Any) -> Scores:
    """From the logits after each token of a question and its begun answer, (tokens, words)."""
    first = len(one.ids) - len(one.value) - 1
    before = np.asarray(logits[first:], np.float32)
    nats = -log_likelihoods(None, before, one.ids[first:])
    best = max(one.choices, key=lambda token: before[0, token])
    return {
        COMPLETED: float(before[:-1].argmax(-1).tolist() == list(one.value)),
        CHOSEN: float(best == one.choices[0]),
        NATS: float(nats.mean()),
    }


def means(found: Sequence[Sequence[Scores]]) -> dict[str, list[float]]:
    """Of each text, over its questions."""
    return {name: [float(np.mean([one[name] for one in row])) for row in found] for name in NAMES}
