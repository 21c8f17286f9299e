"""The prompts of a batch: text waits for its turn, and pictures are read when it has come."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .core.picture_prompts import has_pictures
from .core.prompts import check_ids, prompt_ids
from .errors import ConfigError, UnsupportedFeatureError

# bytes of what processors made that wait to be read; of more pictures it is made once more
HELD = 1 << 30

Begun = tuple[list[int], list[int], Any]


@dataclass
class Words:
    """A prompt of text, and the cache that goes before it."""

    ids: list[int]
    cache: Any
    sees = False

    def begun(self, step: int) -> Begun:
        """What the generator reads, what was read before, and the cache that holds that."""
        # nothing but the batch holds on to it
        cache, self.cache = self.cache, None
        return self.ids, [], cache


@dataclass
class Shown:
    """A prompt with pictures; ``make`` has the processor make it, ``made`` is what came of it."""

    room: Any
    model: Any
    ids: list[int]
    cache: Any
    make: Callable[[], Any]
    made: Any
    sees = True

    @property
    def nbytes(self) -> int:
        """Of pixels and what else is read with them."""
        given = [self.made, self.made.given] if self.made is not None else []
        values = [value for one in given for value in (one if isinstance(one, dict) else vars(one)).values()]
        return sum(int(getattr(value, "nbytes", 0)) for value in values)

    def begun(self, step: int) -> Begun:
        """As :meth:`Words.begun`: all but the last token is read here, into a cache of its own."""
        seen = self.room.Seen(self.model, self.made or self.make())
        cache, self.cache, self.made = self.cache.copy(), None, None
        seen.read(cache, step)
        return self.ids[-1:], self.ids[:-1], cache


def rows_of(
    room: Any,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[Any, Any, Any]],
    vocabulary: int | None,
) -> list[Words | Shown]:
    """The prompts of a batch, in any form, each with its pictures, or None, and its cache.

    Args:
        room: the backend's module ``batching``.

    Raises:
        ConfigError: a prompt that cannot work.
        UnsupportedFeatureError: one ends with a picture, which no batch can read.
    """
    found, held = list[Words | Shown](), 0
    for number, (prompt, images, cache) in enumerate(prompts):
        first = cache.seen == 0
        if has_pictures(prompt, images):
            make = functools.partial(room.prepared, model, tokenizer, prompt, images, first)
            try:
                made = make()
            except ConfigError as error:
                raise ConfigError(f"prompts[{number}]: {error}") from error
            row = Shown(room, model, made.tokens, cache, make, made)
            check_ids(row.ids, vocabulary)
            _check_end(room, model, row.ids)
            if held + row.nbytes > HELD:
                row.made = None
            else:
                held += row.nbytes
            found.append(row)
        else:
            ids = prompt_ids(tokenizer, prompt, first, vocabulary)
            room.check_no_pictures(model, ids)
            found.append(Words(ids, cache))
    return found


def _check_end(room: Any, model: Any, ids: list[int]) -> None:
    try:
        room.check_no_pictures(model, ids[-1:])
    except ConfigError as error:
        raise UnsupportedFeatureError(
            "a prompt ends with a picture, and in a batch the last token must be text; give text after it, "
            "or generate one text after another"
        ) from error
