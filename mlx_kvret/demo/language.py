"""The demo model's language: 198 words in which it is known which tokens will be needed later.

A text is filler, read almost like sentences ("the weary miller walks past a quiet river"), with

``remember NAME VALUE``  a fact: each name has at most one
``rumour NAME VALUE``    a decoy, never asked for, always another value than the name's fact
``recall NAME VALUE .``  a question, its answer and the end token

``<s>`` stands at position 0 only. Words are tokens; an id is the word's place in ``WORDS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import numpy as np

MARKS = ("<s>", ".", "<unk>", "remember", "rumour", "recall")
BOS, END, UNKNOWN, REMEMBER, RUMOUR, RECALL = range(len(MARKS))

_NAMES = """
    Ada Agnes Alan Alma Amos Anna Arthur Basil Bella Boris Carl Clara Cora Daisy David Diana
    Edgar Edith Elsa Emil Emma Ezra Fiona Flora Frank Freya Gilda Grace Greta Harold Hazel Hector
    Helga Hugo Ida Ingrid Iris Ivan Jacob Jane Jonas Judith Karl Kate Laura Leo Linus Lucy
    Mabel Martha Max Mira Nadia Nora Oscar Otto Paula Peter Ralph Rosa Silas Stella Thea Victor
"""
_VALUES = """
    amber apricot azure beige black blue bronze brown burgundy cerise charcoal chestnut cobalt copper
    coral cream crimson cyan ebony emerald fuchsia gold gray green indigo ivory jade khaki lavender lemon
    lilac lime magenta maroon mauve mint navy ochre olive orange peach pearl pink plum purple red ruby rust
    saffron salmon sapphire scarlet sepia sienna silver tan tawny teal topaz turquoise umber violet white
    yellow
"""
_CLASSES = {
    "determiner": "the a this that every one some his",
    "adjective": "quiet small tall cold warm broken lonely hidden distant gentle weary narrow",
    "noun": """miller river horse tower baker forest bridge farmer garden valley shepherd village mountain
    sailor market harbour""",
    "verb": "walks sleeps sings waits runs rests stands wanders whispers falls moves turns",
    "preposition": "past over beneath beside toward through around behind across near",
    "conjunction": "and while because until but so",
}
_FOLLOWING = {
    "determiner": ("adjective", "noun", "adjective", "noun"),
    "adjective": ("noun",) * 4,
    "noun": ("verb", "preposition", "verb", "conjunction"),
    "verb": ("preposition", "conjunction", "preposition", "preposition"),
    "preposition": ("determiner",) * 4,
    "conjunction": ("determiner",) * 4,
}
NAMES, VALUES = tuple(_NAMES.split()), tuple(_VALUES.split())
FILLER = tuple(word for words in _CLASSES.values() for word in words.split())
WORDS = MARKS + NAMES + VALUES + FILLER

FIRST_NAME = len(MARKS)
FIRST_VALUE = FIRST_NAME + len(NAMES)
FIRST_FILLER = FIRST_VALUE + len(VALUES)
ID = {word: index for index, word in enumerate(WORDS)}


def _successors() -> np.ndarray:
    """The filler's Markov chain: ids of the four equally likely next words, (64, 4)."""
    # taking turns within a class uses every word equally often
    turn = {name: cycle(words.split()) for name, words in _CLASSES.items()}
    return np.array(
        [
            [ID[next(turn[follower])] for follower in _FOLLOWING[name]]
            for name, words in _CLASSES.items()
            for _ in words.split()
        ]
    )


SUCCESSORS = _successors()


def encode(text: str) -> list[int]:
    """Ids of the words of a text, without ``<s>``; an unknown word raises ValueError."""
    words = text.split()
    if unknown := sorted({word for word in words if word not in ID}):
        raise ValueError(f"the demo language has no word {', '.join(unknown[:4])!r}; see language.WORDS")
    return [ID[word] for word in words]


def decode(ids: list[int] | tuple[int, ...]) -> str:
    """The text of a sequence of ids, words joined by spaces."""
    return " ".join(WORDS[i] for i in ids)


def filler(rng: np.random.Generator, count: int, previous: int) -> list[int]:
    """``count`` ids that continue the chain after the filler id ``previous``."""
    ids = []
    for choice in rng.integers(SUCCESSORS.shape[1], size=count):
        previous = int(SUCCESSORS[previous - FIRST_FILLER, choice])
        ids.append(previous)
    return ids


def other_value(rng: np.random.Generator, value: int | None) -> int:
    """The id of a random value that is not ``value``."""
    drawn = FIRST_VALUE + int(rng.integers(len(VALUES)))
    return other_value(rng, value) if drawn == value else drawn


@dataclass(frozen=True)
class Story:
    """A text that states facts.

    ``ids`` (tokens,) with ``<s>`` first; ``facts`` maps names to values; ``useful`` holds the position of
    each fact's value, in the order of ``facts``: what a perfect eviction policy would keep.
    """

    ids: tuple[int, ...]
    facts: dict[str, str]
    useful: tuple[int, ...]

    @property
    def text(self) -> str:
        """The words without ``<s>``, which the tokenizer adds."""
        return decode(self.ids[1:])


def question(name: str) -> tuple[int, int]:
    """The ids of ``recall NAME``."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not a name of the demo language; see language.NAMES")
    return RECALL, ID[name]


def story(
    tokens: int, facts: int = 16, decoys: int | None = None, seed: int | np.random.Generator = 0
) -> Story:
    """A random story of exactly ``tokens`` tokens, ``<s>`` included; the same seed gives the same story.

    ``decoys`` is ``tokens // 8`` unless given, half of them about a fact's name. Facts and decoys stand in
    random order at random places.
    """
    decoys = tokens // 8 if decoys is None else decoys
    if not 1 <= facts <= len(NAMES):
        raise ValueError(f"facts is {facts}; expected 1 to {len(NAMES)}, one for each name at most")
    if decoys < 0:
        raise ValueError(f"decoys is {decoys}; expected 0 or more")
    spare = tokens - 1 - 3 * (facts + decoys)
    if spare < 0:
        raise ValueError(
            f"tokens is {tokens}; {facts} facts and {decoys} decoys of 3 tokens need {tokens - spare} or more"
        )
    rng = np.random.default_rng(seed)
    names = FIRST_NAME + rng.permutation(len(NAMES))
    truth = {int(names[i]): FIRST_VALUE + int(rng.integers(len(VALUES))) for i in range(facts)}
    told = list(truth)
    elements = [(REMEMBER, name, value) for name, value in truth.items()]
    for _ in range(decoys):
        name = told[rng.integers(facts)] if rng.random() < 0.5 else int(rng.choice(names))
        elements.append((RUMOUR, name, other_value(rng, truth.get(name))))

    gaps = np.diff(np.sort(rng.integers(spare + 1, size=len(elements))), prepend=0, append=spare)
    previous = FIRST_FILLER + int(rng.integers(len(FILLER)))
    ids, useful = [BOS], dict[int, int]()
    for gap, index in zip(gaps, [*rng.permutation(len(elements)), None], strict=True):
        words = filler(rng, int(gap), previous)
        previous = words[-1] if words else previous
        ids += words
        if index is not None:
            mark, name, value = elements[index]
            if mark == REMEMBER:
                useful[name] = len(ids) + 2
            ids += [mark, name, value]
    facts_told = {WORDS[name]: WORDS[value] for name, value in truth.items()}
    return Story(tuple(ids), facts_told, tuple(useful[name] for name in truth))
