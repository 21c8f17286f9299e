"""Several prompts at once, each in a bounded cache of its own, on either backend's batch generator.

A prompt with pictures is read alone, up to its last token, and decodes with the others from there on.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .api import backend_of
from .core.detokenizer import Detokenizer
from .core.options import MAX_SEED, short, whole
from .core.picture_prompts import spoken_by
from .core.request import check_generation, check_max_tokens, split_eviction
from .core.sampling import SAMPLING, Sampling, split_sampling
from .core.streams import closed_at_exit
from .errors import ConfigError
from .rows import rows_of

ROWS = 8
# how many tokens "no limit" is
ENDLESS = 2**31 - 1


@dataclass(frozen=True)
class BatchResponse:
    """One more token of the answer to one prompt.

    ``index`` tells which prompt, ``text`` is what became certain with the ``token``, the ``count``-th of the
    answer. With the last one come ``finish_reason``, "stop" or "length", and ``cache``, which holds the
    prompt and the answer, that token too, and goes on by itself.
    """

    index: int
    text: str
    token: int
    prompt_tokens: int
    count: int
    finish_reason: str | None = None
    cache: Any = None


def stream_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    budget: Any = None,
    max_tokens: Any = 256,
    caches: Sequence[Any] | None = None,
    rows: int = ROWS,
    prefill_step_size: int = 2048,
    seed: Any = None,
    images: Sequence[Any] | None = None,
    **options: Any,
) -> Iterator[BatchResponse]:
    """Answers to several prompts side by side, by token, in the order in which they come.

    A row is answered as it would be alone: it has a cache of its own budget, in arrays that all rows share,
    and random numbers of its own. When one ends the next prompt takes its place.

    Args:
        prompts: a list of prompts of any length, each in any form that :func:`mlx_kvret.generate` takes.
        budget, max_tokens: one for all, or a list of one each.
        caches: caches to go on with, one each, instead of ``budget`` and the like; they stay as they are.
        rows: how many prompts are answered at a time (8).
        prefill_step_size: tokens of each prompt that are read in one forward pass (2048).
        images: of each prompt its pictures, a list, or a single one, or None: ``[[one, two], None, three]``.
        seed: of the first prompt where tokens are drawn, the next one's is one more; or a list.
        options: eviction options as of :func:`mlx_kvret.make_cache`, and sampling options as of
            :func:`mlx_kvret.generate`, the same for all rows.

    Raises:
        ConfigError: no list, or not one value for each prompt; else as :func:`mlx_kvret.generate`.
    """
    room = importlib.import_module(f"{backend_of(model).__package__}.batching")
    asked, tokenizer = _prompts(prompts), spoken_by(tokenizer)
    whole("rows", rows, 1)
    drawn, rest = split_sampling(options)
    seeds = _seeds(drawn, room.alike(model, drawn).seed if seed is None else seed, len(asked))
    eviction, _ = split_eviction(rest, caches is not None, SAMPLING)
    check_generation({"prefill_step_size": prefill_step_size}, drawn)
    limits = _each(max_tokens, len(asked), "max_tokens")
    for limit in limits:
        check_max_tokens(limit)
    known = room.vocabulary(model)
    drawn.check_vocabulary(known)
    if caches is None:
        budgets = _each(budget, len(asked), "budget")
        held = [room.make_cache(model, budget=own, **eviction) for own in budgets]
    elif budget is not None:
        raise ConfigError("budgets were decided when the caches were made; drop budget, or drop caches")
    else:
        held = [room.checked_cache(model, cache) for cache in _as_many(caches, len(asked), "caches")]
    if images is not None and not isinstance(images, (list, tuple)):
        raise ConfigError(
            f"images is a {type(images).__name__}; expected a list of one for each prompt: of pictures, a "
            "picture, or None"
        )
    shown = [None] * len(asked) if images is None else _as_many(images, len(asked), "images")
    waiting = rows_of(room, model, tokenizer, list(zip(asked, shown, held, strict=True)), known)
    columns = {
        "max_tokens": [ENDLESS if limit < 0 else limit for limit in limits],
        "samplers": [room.of_first(model, room.alone(own)) for own in seeds],
        "logits_processors": [room.processors_of(own) for own in seeds],
    }
    reader = room.TokenIds() if tokenizer is None else tokenizer
    generator = room.BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(room.stop_tokens(model, reader))],
        completion_batch_size=rows,
        prefill_batch_size=rows,
        prefill_step_size=prefill_step_size,
    )
    # prompts of text may wait in the generator, pictures are read when there is a row for them
    most = rows if any(row.sees for row in waiting) else len(waiting)
    line = _Line(waiting, columns, most, prefill_step_size)
    return closed_at_exit(_responses(room, model, reader, generator, line))


def generate_batch(model: Any, tokenizer: Any, prompts: Sequence[Any], **options: Any) -> list[str]:
    """The texts that a model goes on with after each prompt. Arguments as of :func:`stream_batch`.

    >>> mlx_kvret.generate_batch(model, tokenizer, ["first", "second"], budget=[512, 1024])
    """
    texts = [""] * len(_prompts(prompts))
    for response in stream_batch(model, tokenizer, prompts, **options):
        texts[response.index] += response.text
    return texts


@dataclass
class _Answer:
    """The answer to one prompt so far."""

    index: int
    prompt_tokens: int
    text: Detokenizer
    count: int = 0

    def told(self, token: int, reason: str | None, cache: Any) -> BatchResponse:
        self.count += 1
        text = "" if reason == "stop" else self.text.add(token)
        if reason is not None:
            text += self.text.end()
        return BatchResponse(self.index, text, token, self.prompt_tokens, self.count, reason, cache)


@dataclass
class _Line:
    """Prompts that wait, ``most`` of which may be with the generator; ``columns`` hold what else each has."""

    rows: list[Any]
    columns: dict[str, list[Any]]
    most: int
    step: int
    next_one: int = 0

    def enter(self, generator: Any, reader: Any, answers: dict[int, _Answer]) -> None:
        """Have as many more be answered as there is room for."""
        while self.next_one < len(self.rows) and (room := self.most - len(answers)) > 0:
            first = self.next_one
            # what waits is inserted at once, what sees one by one
            count = (
                1
                if self.rows[first].sees
                else next(
                    (at for at, row in enumerate(self.rows[first : first + room]) if row.sees),
                    min(room, len(self.rows) - first),
                )
            )
            self.next_one += count
            rows = self.rows[first : self.next_one]
            given = {name: values[first : self.next_one] for name, values in self.columns.items()}
            begun = [row.begun(self.step) for row in rows]
            ids, before, caches = ([one[part] for one in begun] for part in range(3))
            uids = generator.insert(ids, caches=caches, all_tokens=before, **given)
            for at, (uid, row) in enumerate(zip(uids, rows, strict=True), first):
                answers[uid] = _Answer(at, len(row.ids), Detokenizer(reader.decode))


def _responses(room: Any, model: Any, reader: Any, generator: Any, line: _Line) -> Iterator[BatchResponse]:
    """The loop; what was asked has been checked."""
    answers: dict[int, _Answer] = {}
    try:
        line.enter(generator, reader, answers)
        while responses := generator.next_generated():
            for one in responses:
                cache = None if one.finish_reason is None else room.row_cache(model, one.prompt_cache)
                answer = answers[one.uid] if cache is None else answers.pop(one.uid)
                yield answer.told(int(one.token), one.finish_reason, cache)
            line.enter(generator, reader, answers)
    finally:
        generator.close()


def _prompts(values: Any) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ConfigError(f"prompts is {short(values)}; expected a list of prompts, also for one")
    if not values:
        raise ConfigError("prompts is an empty list; give at least one prompt")
    return list(values)


def _each(value: Any, count: int, name: str) -> list[Any]:
    """One value for each prompt, from as many or from one for all."""
    return _as_many(value, count, name) if isinstance(value, (list, tuple)) else [value] * count


def _seeds(drawn: Sampling, seed: Any, count: int) -> list[Sampling]:
    """How each row's tokens are drawn: equal prompts get answers of their own."""
    if seed is not None and not isinstance(seed, (list, tuple)):
        whole("seed", seed, 0, MAX_SEED)
        seed = [(seed + index) % (MAX_SEED + 1) for index in range(count)]
    return [dataclasses.replace(drawn, seed=own) for own in _each(seed, count, "seed")]


def _as_many(values: Sequence[Any], count: int, name: str) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) != count:
        found = f"has {len(values)} values" if isinstance(values, Sequence) else f"is {short(values)}"
        raise ConfigError(f"{name} {found}, there are {count} prompts; give one each")
    return list(values)
