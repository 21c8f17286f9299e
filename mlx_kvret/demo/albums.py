"""Albums: texts with pictures, of which it is known which tokens will be needed later.

Facts are *seen* (a framed cell of a picture) or *told* (``remember NAME VALUE``); decoys are cells without
a frame and rumours. So tokens of both modalities compete for one cache, in whatever proportion is wished.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..bitmap import Bitmap
from ..errors import ConfigError
from . import language as words
from .pictures import (
    DECOY,
    FACT,
    IMAGE,
    NAME_IDS,
    NAMES,
    PALETTE,
    START,
    STOP,
    VALUE_IDS,
    WORDS,
    cells,
    picture,
)

Rng = np.random.Generator
SIDE, SHARE = 6, 0.8


@dataclass
class Album:
    """A text with pictures, as it grows.

    ``ids`` hold one ``IMAGE`` token for every cell of ``pictures``, in order. ``facts`` maps the place of a
    name in ``NAMES`` to the place of its value in ``PALETTE`` and the position of the token that states it:
    of the value's word, or of the cell. ``starts`` are positions at which an element begins.
    """

    ids: list[int] = field(default_factory=lambda: [words.BOS])
    pictures: list[Bitmap] = field(default_factory=list)
    facts: dict[int, tuple[int, int]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)

    @property
    def seen(self) -> set[int]:
        """Names whose fact is in a picture."""
        return {name for name, (_, place) in self.facts.items() if self.ids[place] == IMAGE}

    def add_filler(self, rng: Rng, count: int) -> None:
        """``count`` words that mean nothing."""
        if count:
            self.starts.append(len(self.ids))
            first = words.FIRST_FILLER + int(rng.integers(len(words.FILLER)))
            self.ids += words.filler(rng, count, first)

    def add_told(self, rng: Rng) -> None:
        """A fact in words about a name that has none yet, if one is left."""
        if drawn := self._new_fact(rng):
            self.starts.append(len(self.ids))
            self.facts[drawn[0]] = (drawn[1], len(self.ids) + 2)
            self.ids += [words.REMEMBER, int(NAME_IDS[drawn[0]]), int(VALUE_IDS[drawn[1]])]

    def add_rumour(self, rng: Rng) -> None:
        """A decoy in words."""
        name, value = self._decoy(rng)
        self.starts.append(len(self.ids))
        self.ids += [words.RUMOUR, int(NAME_IDS[name]), int(VALUE_IDS[value])]

    def add_picture(self, rng: Rng, rows: int, columns: int, facts: int, decoys: int) -> None:
        """A picture of cells, of which some state facts (as far as names are left) and some are decoys."""
        count = rows * columns
        kinds, names, values = np.zeros((3, count), np.int64)
        self.starts.append(len(self.ids))
        self.ids.append(START)
        for turn, place in enumerate(rng.permutation(count)[: facts + decoys]):
            drawn = self._new_fact(rng) if turn < facts else self._decoy(rng)
            if drawn is not None:
                kinds[place] = FACT if turn < facts else DECOY
                names[place], values[place] = drawn
                if turn < facts:
                    self.facts[drawn[0]] = (drawn[1], len(self.ids) + int(place))
        self.ids += [IMAGE] * count + [STOP]
        self.pictures.append(picture(cells(rng, kinds, names, values), rows, columns))

    def question(self, name: int) -> tuple[tuple[int, int], int]:
        """The ids of a question after a name's value, and the id of the answer."""
        return (words.RECALL, int(NAME_IDS[name])), int(VALUE_IDS[self.facts[name][0]])

    def prompt(self) -> str:
        """The words without ``<s>``, each picture as one ``<|image_pad|>``: what processors take."""
        told = [i for at, i in enumerate(self.ids) if i != IMAGE or self.ids[at - 1] != IMAGE]
        return " ".join(WORDS[i] for i in told[1:])

    def _new_fact(self, rng: Rng) -> tuple[int, int] | None:
        free = [name for name in range(len(NAMES)) if name not in self.facts]
        return (free[rng.integers(len(free))], int(rng.integers(len(PALETTE)))) if free else None

    def _decoy(self, rng: Rng) -> tuple[int, int]:
        """Another value than the fact's, for half of the decoys of a name that has one already."""
        known = list(self.facts)
        often = known and rng.random() < 0.5
        name = known[rng.integers(len(known))] if often else int(rng.integers(len(NAMES)))
        value = int(rng.integers(len(PALETTE)))
        if name in self.facts and value == self.facts[name][0]:
            value = (value + 1) % len(PALETTE)
        return name, value


def album(
    tokens: int, seen: int, told: int, seed: int | Rng = 0, decoys: int | None = None, side: int = SIDE
) -> Album:
    """A random album of exactly ``tokens`` tokens with ``<s>``, four fifths of them in square pictures.

    Args:
        seen, told: facts in pictures and in words.
        decoys: ``tokens // 12`` unless given, a quarter of them rumours, where there is room.
        side: cells to a side of a picture.

    Raises:
        ConfigError: more facts than there are names, or no room for them.
    """
    if seen < 0 or told < 0 or not 1 <= seen + told <= len(NAMES):
        raise ConfigError(
            f"an album has {seen} + {told} facts; expected 1 to {len(NAMES)} of them, one for a name"
        )
    decoys = tokens // 12 if decoys is None else decoys
    size = side * side + 2
    pictures = max(1, min(int(SHARE * tokens), tokens - 1 - 3 * told) // size)
    room = tokens - 1 - pictures * size - 3 * told
    if room < 0 or seen > pictures * side * side:
        least = 1 + size + 3 * told
        raise ConfigError(
            f"tokens is {tokens}; {seen} facts seen and {told} told need {max(least, tokens - room)}"
        )
    rng, out = np.random.default_rng(seed), Album()
    rumours = min(decoys // 4, room // 6)
    items = ["picture"] * pictures + ["fact"] * told + ["rumour"] * rumours
    facts = np.bincount(rng.integers(pictures, size=seen), minlength=pictures)
    while facts.max() > side * side:
        facts[facts.argmax()] -= 1
        facts[facts.argmin()] += 1
    wrong = np.bincount(rng.integers(pictures, size=decoys - rumours), minlength=pictures)
    gaps = rng.multinomial(room - 3 * rumours, np.ones(len(items)) / len(items))
    drawn = iter(zip(facts.tolist(), wrong.tolist(), strict=True))
    for index, gap in zip(rng.permutation(len(items)), gaps, strict=True):
        out.add_filler(rng, int(gap))
        if items[index] == "picture":
            right, false = next(drawn)
            out.add_picture(rng, side, side, right, min(false, side * side - right))
        elif items[index] == "fact":
            out.add_told(rng)
        else:
            out.add_rumour(rng)
    return out
