"""Tasks in the demo model's own words. Docstrings say what gates trained as in ``examples`` have seen.

Each maker takes a length in tokens and a random generator and gives a sample. All but ``copy`` ask for
facts; an answer is right if the value and then the end token come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..demo.language import (
    BOS,
    END,
    FILLER,
    FIRST_FILLER,
    FIRST_NAME,
    FIRST_VALUE,
    ID,
    NAMES,
    REMEMBER,
    RUMOUR,
    VALUES,
    WORDS,
    Story,
    filler,
    other_value,
    question,
    story,
)
from ..errors import ConfigError
from .samples import Question, Sample, Turn

Rng = np.random.Generator
Triple = tuple[int, int, int]
FACTS, PARTS = 16, 4


def facts(length: int, rng: Rng) -> Sample:
    """16 facts, a decoy for every 8 tokens, all in random order. Seen."""
    return _asked(story(length, FACTS, seed=rng))


def bare(length: int, rng: Rng) -> Sample:
    """16 facts in plain filler, no decoys. At the edge of what was seen."""
    return _asked(story(length, FACTS, 0, rng))


def crowded(length: int, rng: Rng) -> Sample:
    """16 facts, and facts and decoys in two thirds of the text. At the edge of what was seen."""
    return _asked(story(length, FACTS, max(0, 2 * length // 9 - FACTS), rng))


def many(length: int, rng: Rng) -> Sample:
    """48 facts (or half of a short text) and half as many tokens of decoys. Unseen: there were at most 32."""
    return _asked(story(length, min(48, length // 6), length // 12, rng))


def hostile(length: int, rng: Rng) -> Sample:
    """Every decoy is a false value of a fact's own name. Unseen: half of them were."""
    truth = _truth(rng, FACTS)
    elements = _shuffled([*_facts(truth), *_decoys(truth, length // 8, rng)], rng)
    return _asked(_told([BOS, *_compose(length - 1, elements, rng)], truth))


def early(length: int, rng: Rng) -> Sample:
    """All facts come first, decoys after them. Unseen: the order was random."""
    truth = _truth(rng, FACTS)
    elements = [*_shuffled(_facts(truth), rng), *_decoys(truth, length // 8, rng)]
    return _asked(_told([BOS, *_compose(length - 1, elements, rng)], truth))


def turns(length: int, rng: Rng) -> Sample:
    """A conversation in one bounded cache: four parts with four facts each, questions about all facts so
    far after each of them. Two questions and their answers stay in the history. Unseen as such."""
    truth = _truth(rng, FACTS)
    names, told, ids, start = list(truth), list[int](), [BOS], 0
    made, history = [], 2 * 4
    for part in range(PARTS):
        new = names[part * FACTS // PARTS : (part + 1) * FACTS // PARTS]
        told += new
        here = {name: truth[name] for name in new}
        size = length // PARTS - (history if part else 1) + (length % PARTS if part == PARTS - 1 else 0)
        elements = [*_facts(here), *_decoys(truth, size // 8, rng)]
        ids += _compose(size, _shuffled(elements, rng), rng)
        known = _told(ids, {name: truth[name] for name in told})
        made.append(Turn(tuple(ids[start:]), _questions(known)))
        start = len(ids)
        for name in rng.choice(told, size=2, replace=False):
            ids += [*question(WORDS[name]), truth[name], END]
    return Sample(tuple(made))


def copy(length: int, rng: Rng) -> Sample:
    """24 random words in plain filler, then four of them in a row: which comes next? The model was trained
    to copy; its gates never saw a text of which anything but facts was asked. Unseen."""
    pattern = [int(word) for word in rng.permutation(np.arange(FIRST_NAME, FIRST_FILLER))[:24]]
    before = int(rng.integers(max(1, length - len(pattern) - 1)))
    first = FIRST_FILLER + int(rng.integers(len(FILLER)))
    words = filler(rng, length - len(pattern) - 1, first)
    ids = [BOS, *words[:before], *pattern, *words[before:]]
    places = range(4, len(pattern) - 1)
    asked = tuple(
        Question(tuple(pattern[i - 4 : i]), (pattern[i],), useful=(1 + before + i,)) for i in places
    )
    return Sample((Turn(tuple(ids), asked),))


TASKS = {f.__name__: f for f in (facts, bare, crowded, many, hostile, early, turns, copy)}
SHORTEST = 192


def make(name: str, length: int, rng: Rng) -> Sample:
    """A sample of a demo task.

    Raises:
        ConfigError: the text would be too short for its facts.
    """
    if length < SHORTEST:
        raise ConfigError(f"length is {length}; the demo tasks need at least {SHORTEST} tokens")
    return TASKS[name](length, rng)


def _asked(told: Story) -> Sample:
    return Sample((Turn(told.ids, _questions(told)),))


def _questions(told: Story) -> tuple[Question, ...]:
    return tuple(
        Question(question(name), (ID[value], END), useful=(place,))
        for (name, value), place in zip(told.facts.items(), told.useful, strict=True)
    )


def _told(ids: Sequence[int], truth: dict[int, int]) -> Story:
    """A story from its tokens and facts, with the places of the facts' values."""
    place = {ids[i + 1]: i + 2 for i in range(len(ids) - 2) if ids[i] == REMEMBER}
    return Story(
        tuple(ids),
        {WORDS[name]: WORDS[value] for name, value in truth.items()},
        tuple(place[name] for name in truth),
    )


def _truth(rng: Rng, count: int) -> dict[int, int]:
    names = FIRST_NAME + rng.permutation(len(NAMES))[:count]
    return {int(name): FIRST_VALUE + int(rng.integers(len(VALUES))) for name in names}


def _facts(truth: dict[int, int]) -> list[Triple]:
    return [(REMEMBER, name, value) for name, value in truth.items()]


def _decoys(truth: dict[int, int], count: int, rng: Rng) -> list[Triple]:
    names = [int(name) for name in rng.choice(list(truth), size=count)]
    return [(RUMOUR, name, other_value(rng, truth[name])) for name in names]


def _shuffled(elements: list[Triple], rng: Rng) -> list[Triple]:
    return [elements[i] for i in rng.permutation(len(elements))]


def _compose(length: int, elements: Iterable[Triple], rng: Rng) -> list[int]:
    """The elements in their order with filler between them, ``length`` tokens in all."""
    elements = list(elements)
    spare = length - 3 * len(elements)
    cuts = np.sort(rng.integers(spare + 1, size=len(elements)))
    words = filler(rng, spare, FIRST_FILLER + int(rng.integers(len(FILLER))))
    ids: list[int] = []
    for start, end, element in zip([0, *cuts], [*cuts, spare], [*elements, ()], strict=True):
        ids += [*words[start:end], *element]
    return ids
