"""Training data by the base model itself: it goes on with texts, and talks about them.

Gates learn what the model will need in its own answers, so nothing but the model has to be at hand. Records
are written some at a time; a process that was killed goes on behind the last whole one.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..api import generate, load
from ..batching import ROWS, generate_batch
from ..core.picture_prompts import spoken_by
from ..errors import ConfigError, UnsupportedFeatureError
from .records import Record


class Asked(NamedTuple):
    """A prompt's token ids, the most new tokens, and the seed they are drawn with."""

    ids: list[int]
    most: int
    seed: int


# the answers' texts
Answer = Callable[[Sequence[Asked]], Sequence[str]]
# a record that comes to be: asks, is answered, and is returned
Writing = Generator[Asked, str, dict[str, Any]]
# tokens for which an answer is worth asking
LEAST = 16
OPENERS = tuple(
    f"{form} {topic}."
    for topic in (
        "bread", "the tides", "a small harbour town", "bicycles", "an old library", "the moon landing",
        "keeping bees", "a journey by night train", "how computers add", "the history of paper",
        "a quarrel between neighbours", "growing tomatoes", "chess", "a lost letter", "vaccines", "rivers",
        "learning the violin", "a detective in winter", "prime numbers", "the price of coffee",
    )
    for form in ("Explain to a beginner everything about", "Write a long story about", "Write an essay on",
                 "Write a dialogue between two friends about")
)  # fmt: skip
ASKED = (
    "Summarise this in a few sentences.",
    "Which names and numbers occur in it?",
    "What happens, and in which order?",
    "What came first, and what followed from it?",
    "Write how it goes on.",
    "Explain the most difficult sentence in it.",
)
LATER = (
    "What did you say first?",
    "Repeat the beginning of the text above, word for word.",
    "Say more about that.",
    "What follows from it?",
    "Give an example.",
    "Now tell it again for a child.",
)


def write_records(
    path: Path,
    seeds: Sequence[Record],
    count: int,
    length: int,
    seed: int,
    tokenizer: Any,
    answer: Answer,
    resume: bool = False,
) -> Iterator[int]:
    """Write ``count`` records of about ``length`` tokens as JSON lines.

    Yields how many there are, before the first and after each.
    They stand in ``path`` once all are there, in a file beside it (``.part``) until then.

    Args:
        seeds: texts to go on from and to talk about; without any, a list of openers.
        answer: has the model go on.
        resume: go on behind what a process that was killed has left.
    """
    part = path.with_name(path.name + ".part")
    done = _whole_lines(part) if resume else 0
    if not resume:
        part.unlink(missing_ok=True)
    yield done
    while done < count:
        writing = [
            _record(random.Random(f"{seed} {number}"), seeds, length, tokenizer)
            for number in range(done, min(done + ROWS, count))
        ]
        for record in _together(writing, answer):
            with part.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done += 1
            yield done
    os.replace(part, path)


def _together(writing: Sequence[Writing], answer: Answer) -> list[dict[str, Any]]:
    """The records, all that ask at a time answered at once."""
    records: dict[int, dict[str, Any]] = {}
    asking = {place: next(one) for place, one in enumerate(writing)}
    while asking:
        said = dict(zip(asking, answer(list(asking.values())), strict=True))
        asking = {}
        for place, text in said.items():
            try:
                asking[place] = writing[place].send(text)
            except StopIteration as end:
                records[place] = end.value
    return [records[place] for place in range(len(writing))]


def _record(rng: random.Random, seeds: Sequence[Record], length: int, tokenizer: Any) -> Writing:
    text = _text(rng.choice(seeds)) if seeds else rng.choice(OPENERS)
    talks = bool(tokenizer.chat_template) and (not seeds or rng.random() < 0.5)
    return (yield from (_talk if talks else _go_on)(rng, text, length, tokenizer))


def _go_on(rng: random.Random, text: str, length: int, tokenizer: Any) -> Writing:
    """The first half of a record is the text's, the rest the model's."""
    ids = tokenizer.encode(text)[: max(1, length // 2)]
    said = yield Asked(ids, length - len(ids), rng.getrandbits(32))
    return {"text": tokenizer.decode(ids, skip_special_tokens=True) + said}


def _talk(rng: random.Random, text: str, length: int, tokenizer: Any) -> Writing:
    """Questions on a text, answered by the model, until the record is long enough."""
    ids = tokenizer.encode(text, add_special_tokens=False)[: max(1, length // 2)]
    told = tokenizer.decode(ids)
    question = told if text in OPENERS else f"{told}\n\n{rng.choice(ASKED)}"
    messages: list[dict[str, str]] = []
    while True:
        asked = [*messages, {"role": "user", "content": question}]
        prompt = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
        said, room = "", length - len(prompt)
        if room >= LEAST:
            said = (yield Asked(prompt, min(room, length // 4), rng.getrandbits(32))).strip()
        if not said:
            return {"messages": messages} if messages else (yield from _go_on(rng, text, length, tokenizer))
        messages = [*asked, {"role": "assistant", "content": said}]
        question = rng.choice(LATER)


def _text(record: Record) -> str:
    if record.text is not None:
        return record.text
    return "\n\n".join(str(message.get("content") or "") for message in record.messages or [])


def _whole_lines(part: Path) -> int:
    """Records in a file that a killed process left; a line broken off is cut away."""
    if not part.exists():
        return 0
    data = part.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        part.write_bytes(whole)
    return whole.count(b"\n")


def own_words(
    model: str | Path,
    backend: str,
    seeds: Sequence[Record],
    path: Path,
    count: int,
    length: int,
    seed: int,
    resume: bool = False,
) -> Iterator[int]:
    """As :func:`write_records`, with a model loaded for it on a backend, at temperature 1.

    Raises:
        ConfigError: the file is there already, or the model has no tokenizer.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already; train on it with --data {path}, or remove it")
    network, processor = load(model, None, backend=backend)  # type: ignore[arg-type]
    tokenizer = None if processor is None else spoken_by(processor)
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so it cannot write texts; give --data FILE")

    def answer(asked: Sequence[Asked]) -> Sequence[str]:
        return _answers(network, tokenizer, asked, length)

    yield from write_records(path, seeds, count, length, seed, tokenizer, answer, resume)


def _answers(network: Any, tokenizer: Any, asked: Sequence[Asked], length: int) -> Sequence[str]:
    """Side by side in caches that hold all of ``length`` tokens, or one by one where rows are refused."""
    ids, most, seeds = map(list, zip(*asked, strict=True))
    try:
        return generate_batch(
            network, tokenizer, ids, budget=length, policy="recent", max_tokens=most, seed=seeds, temp=1.0
        )
    except UnsupportedFeatureError:
        return [
            generate(network, tokenizer, one.ids, policy="full", max_tokens=one.most, seed=one.seed, temp=1.0)
            for one in asked
        ]
