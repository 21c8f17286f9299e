"""Tasks in the words and pictures of the demo with eyes: albums of which 16 facts are asked for.

``albums`` has as many facts in pictures as in words; ``albums-12-4`` has 12 *seen* and 4 *told*, and so on.
No split of a budget between pictures and words can be right for all of them.
"""

from __future__ import annotations

import re

import numpy as np

from ..demo.albums import album
from ..demo.language import END
from ..errors import ConfigError
from .samples import Question, Sample, Turn

FACTS, SHORTEST = 16, 192
_RATIOS = tuple((seen, FACTS - seen) for seen in (16, 12, 8, 4, 0))
TASKS = ("albums", *(f"albums-{seen}-{told}" for seen, told in _RATIOS))


def make(name: str, length: int, rng: np.random.Generator) -> Sample:
    """An album of ``length`` tokens, and a question after each of its facts.

    Raises:
        ConfigError: the text would be too short for its facts.
    """
    if length < SHORTEST:
        raise ConfigError(f"length is {length}; albums need at least {SHORTEST} tokens")
    found = re.fullmatch(r"albums-(\d+)-(\d+)", name)
    seen, told = map(int, found.groups()) if found else (FACTS // 2, FACTS // 2)
    made = album(length, seen, told, rng)
    asked = []
    for fact in made.facts:
        ids, value = made.question(fact)
        asked.append(Question(ids, (value, END), useful=(made.facts[fact][1],)))
    return Sample((Turn(tuple(made.ids), tuple(asked), pictures=tuple(made.pictures)),))
