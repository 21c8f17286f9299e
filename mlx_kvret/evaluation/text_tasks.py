"""Long-context tasks generated on the spot for any text model: the RULER family (arXiv 2404.06654).

The kinds of task are RULER's, the wording is ours: figures compare policies, not models with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ..demo.language import FILLER, FIRST_FILLER, WORDS, decode, filler
from .samples import Question, Sample, Turn
from .writer import Piece, Writer

Rng = np.random.Generator
PARTS = 4
_COLOURS = [
    "amber",
    "azure",
    "bronze",
    "coral",
    "crimson",
    "emerald",
    "ivory",
    "jade",
    "lilac",
    "olive",
    "scarlet",
    "teal",
]
_PLACES = [
    "anchor",
    "bridge",
    "canyon",
    "castle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbour",
    "island",
    "lantern",
    "meadow",
]


def needle_single(length: int, rng: Rng, writer: Writer) -> Sample:
    """One number in a haystack."""
    return _needles(length, rng, writer, keys=1, values=1, asked=1)


def needle_multikey(length: int, rng: Rng, writer: Writer) -> Sample:
    """The number of one key among eight."""
    return _needles(length, rng, writer, keys=8, values=1, asked=1)


def needle_multivalue(length: int, rng: Rng, writer: Writer) -> Sample:
    """All four numbers of one key."""
    return _needles(length, rng, writer, keys=1, values=4, asked=1)


def needle_multiquery(length: int, rng: Rng, writer: Writer) -> Sample:
    """The numbers of four keys of eight."""
    return _needles(length, rng, writer, keys=8, values=1, asked=4)


def variable_tracking(length: int, rng: Rng, writer: Writer) -> Sample:
    """All five variables that a value was handed on to, beside a chain with another value."""
    letters = [chr(65 + int(i)) for i in rng.integers(26, size=50)]
    names = ["".join(letters[5 * i : 5 * i + 5]) for i in range(10)]
    values = _numbers(rng, 2, 5)
    chains = [_chain(names[:5], values[0], True), _chain(names[5:], values[1], False)]
    order = rng.permutation([0] * 5 + [1] * 5)
    mixed = [chains[c].pop(0) for c in order]
    pieces = writer.fill(mixed, _noise(rng), length, _place(rng))
    asked = f"\nQuestion: Which five variables have the value {values[0]}?\nAnswer: The variables are"
    return writer.sample(pieces, asked, names[:5], max_tokens=48)


def key_value(length: int, rng: Rng, writer: Writer) -> Sample:
    """One value of a long list of random keys and values."""
    wanted = _pair(rng)

    def noise() -> str:
        return "{}: {}\n".format(*_pair(rng))

    pieces = writer.fill([Piece("{}: {}\n".format(*wanted), True)], noise, length, _place(rng))
    return writer.sample(pieces, f"\nQuestion: What is the value of {wanted[0]}?\nAnswer: It is", wanted[1:])


def common_words(length: int, rng: Rng, writer: Writer) -> Sample:
    """The ten words that come six times as often as the others."""
    drawn = [WORDS[i] for i in rng.permutation(np.arange(6, FIRST_FILLER))[:70]]
    weights = np.array([6.0] * 10 + [1.0] * 60)

    def noise() -> str:
        return f" {rng.choice(drawn, p=weights / weights.sum())}"

    pieces = writer.fill([], noise, length, _place(rng))
    marked = [Piece(piece.text, piece.text.strip() in drawn[:10]) for piece in pieces]
    asked = "\nQuestion: Which ten words are the most common in this list?\nAnswer: They are"
    return writer.sample(marked, asked, drawn[:10], max_tokens=64)


def multi_turn(length: int, rng: Rng, writer: Writer) -> Sample:
    """A conversation in one bounded cache: four parts with two numbers each, questions about all of them so
    far after each part; one of them stays in the history with its answer."""
    names, numbers = _keys(rng, 2 * PARTS), _numbers(rng, 2 * PARTS, 7)
    turns, told, history, start = list[Turn](), list[Question](), "", 0
    for part in range(PARTS):
        new = range(2 * part, 2 * part + 2)
        needles = [Piece(_needle(names[i], numbers[i]), True) for i in new]
        begun = writer.before if part == 0 else writer.encode(history)
        filled = writer.fill(needles, _noise(rng), length // PARTS - len(begun), _place(rng))
        ids, useful = writer.read(filled, start + len(begun))
        for i, places in zip(new, useful, strict=True):
            told.append(writer.question(_asked([names[i]]), numbers[i : i + 1], "all", 32, [places]))
        turns.append(Turn(begun + ids, tuple(told)))
        start += len(begun + ids)
        again = int(rng.integers(len(told)))
        history = f"{_asked([names[again]])} {numbers[again]}.\n"
    return Sample(tuple(turns))


TASKS: dict[str, Callable[[int, Rng, Writer], Sample]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        needle_single,
        needle_multikey,
        needle_multivalue,
        needle_multiquery,
        variable_tracking,
        key_value,
        common_words,
        multi_turn,
    )
}


def _needles(length: int, rng: Rng, writer: Writer, keys: int, values: int, asked: int) -> Sample:
    names, numbers = _keys(rng, keys), _numbers(rng, keys * values, 7)
    wanted = names[:asked]
    needles = [
        Piece(_needle(name, number), name in wanted)
        for name, number in zip(np.repeat(names, values).tolist(), numbers, strict=True)
    ]
    mixed = [needles[i] for i in rng.permutation(len(needles))]
    pieces = writer.fill(mixed, _noise(rng), length, _place(rng))
    references = numbers[: asked * values]
    return writer.sample(pieces, _asked(wanted), references, max_tokens=16 * len(references) + 16)


def _keys(rng: Rng, count: int) -> list[str]:
    drawn = rng.permutation(len(_COLOURS) * len(_PLACES))[:count]
    return [f"{_COLOURS[i % len(_COLOURS)]}-{_PLACES[i // len(_COLOURS)]}" for i in drawn]


def _needle(name: str, number: str) -> str:
    return f" One of the secret numbers of {name} is {number}."


def _asked(names: Sequence[str]) -> str:
    told = ", ".join(names)
    return (
        f"\nQuestion: What are all the secret numbers of {told} in the text?\n"
        f"Answer: The secret numbers of {told} are"
    )


def _noise(rng: Rng) -> Callable[[], str]:
    """Sentences of the demo language's filler."""

    def sentence() -> str:
        first = FIRST_FILLER + int(rng.integers(len(FILLER)))
        return f" {decode(filler(rng, 12, first)).capitalize()}."

    return sentence


def _place(rng: Rng) -> Callable[[int], int]:
    return lambda places: int(rng.integers(places))


def _numbers(rng: Rng, count: int, digits: int) -> list[str]:
    low = 10 ** (digits - 1)
    return [str(low + int(n)) for n in rng.integers(9 * low, size=count)]


def _chain(names: Sequence[str], value: str, useful: bool) -> list[Piece]:
    first = Piece(f" VAR {names[0]} = {value}.", useful)
    later = [Piece(f" VAR {b} = VAR {a}.", useful) for a, b in pairwise(names)]
    return [first, *later]


def _pair(rng: Rng) -> tuple[str, str]:
    key, value = (f"{int(n):08x}" for n in rng.integers(1 << 32, size=2))
    return key, value
