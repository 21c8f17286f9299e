"""Texts with facts between their sentences, of exactly as many tokens as wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Sample, Turn
from mlx_kvret.evaluation.writer import Writer

from .facts import ANSWER_TOKENS, IN_PROSE, Asked, ask, draw_facts

READ = "Read this text.\n\n"
# asked like this the model answers; asked the bare question it often speaks about the text
WORDS = "\n\nQuestion: {}\nAnswer with one sentence of the text."


@dataclass(frozen=True)
class Text:
    """A user's turn of prose, up to where a question will stand, and what is asked then."""

    sample: Sample
    asked: tuple[Asked, ...]


def texts_with_facts(
    kinds_of_text: Mapping[str, str], tokenizer: Any, length: int, count: int, seed: int = 0
) -> list[Text]:
    """``count`` texts of each kind, ``length`` tokens each, with five facts in the same places of all.

    Raises:
        ConfigError: a kind has not so much text.
    """
    rng, writer = np.random.default_rng(seed), Writer(tokenizer, chat=True)
    found = []
    for name, prose in sorted(kinds_of_text.items()):
        ids = writer.encode(prose[: 12 * length * count + 1000])
        if len(ids) < (count + 1) * length:
            raise ConfigError(f"the text {name} has no {count} pieces of {length} tokens; take fewer")
        ends = _sentence_ends(ids, tokenizer)
        for piece in range(count):
            found.append(_text(ids, ends, piece * length, length, writer, rng))
    return found


def _text(
    ids: Sequence[int], ends: Sequence[int], start: int, length: int, writer: Writer, rng: np.random.Generator
) -> Text:
    facts = draw_facts(IN_PROSE, rng)
    told = [writer.encode(f" {fact.told}") for fact in facts]
    begin = writer.before + writer.encode(READ)
    room = length - len(begin) - sum(map(len, told))
    # from the end of a sentence on, so that nothing begins in its middle
    first = next(end for end in ends if end >= start)
    out, useful, done = list(begin), [], first
    for number, tokens in enumerate(told):
        wanted = first + room * (2 * number + 1) // (2 * len(told))
        place = max(
            done, min((end for end in ends if end <= first + room), key=lambda end: abs(end - wanted))
        )
        out += ids[done:place]
        useful.append(tuple(range(len(out), len(out) + len(tokens))))
        out += tokens
        done = place
    out += ids[done : first + room]
    asked = [
        ask(
            fact,
            writer.question(WORDS.format(fact.asked), (fact.value,), "any", ANSWER_TOKENS, [places]),
            writer,
        )
        for fact, places in zip(facts, useful, strict=True)
    ]
    questions = tuple(one.question for one in asked)
    return Text(Sample((Turn(tuple(out), questions),)), tuple(asked))


def _sentence_ends(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Places behind a full stop, with a space or a line break behind it."""
    words = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        place
        for place, (word, then) in enumerate(pairwise(words), 1)
        if word.endswith((".", "!", "?")) and then[:1] in ("Ġ", "Ċ", "▁")
    ]
