"""What mlx-lm's loops leave in a bounded cache: the prompt and every token they gave out, however they end.

The loop feeds a token before it gives it out, one step ahead of whoever takes it, and speculative decoding
gives out tokens it has not fed. What was fed for nobody is taken back in the end, and what was not fed is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.passes import Passes
from ..core.streams import closed_at_exit
from ..errors import UnsupportedFeatureError
from .cache import BoundedCache
from .entry import BoundedKVCache
from .forward import confirm, doubt, leaves


class Text:
    """A prompt of ``length`` tokens and the answer to it, as they come into the entries of a ``cache``."""

    def __init__(self, model: nn.Module, cache: list[Any], length: int) -> None:
        self._model, self._cache, self._parts = model, cache, leaves(cache)
        self._shared = next((p.shared for p in self._parts if isinstance(p, BoundedKVCache)), None)
        owner: Any = cache if self._shared is None else self._shared
        self._passes: Passes = owner.passes
        self._passes.check()
        self._read = self._seen + length

    @property
    def _seen(self) -> int:
        whole: Any = self._cache
        return int(whole.seen) if self._shared is None else self._shared.seen

    def end(self, given: list[int]) -> None:
        """The answer ends after the tokens that were given out: have the cache hold just these.

        Of a prompt that was broken off it holds what was read.
        """
        self._passes.repair()
        extra = self._seen - self._read - len(given)
        if self._passes.lost:
            return
        if extra > 0:
            self._take_back(extra)
        elif extra < 0 and given:
            self._model(mx.array([given[extra:]]), cache=self._cache)
        confirm(self._parts, self._shared, self._passes)

    def failed(self, error: BaseException) -> None:
        """What MLX fails at may be what the loop has left in flight."""
        doubt(self._passes, error)

    def _take_back(self, count: int) -> None:
        others = [part for part in self._parts if not isinstance(part, BoundedKVCache)]
        waiting = count if self._shared is None else self._shared.row.length
        if count > waiting or not all(part.is_trimmable() for part in others):
            self._passes.lose(
                f"{count} tokens were read that nobody was given, and cannot be taken back from a sliding "
                "window or a state"
            )
        elif self._shared is None:
            for part in others:
                part.trim(count)
        else:
            self._shared.take_back(count, others)


def alone(stock: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's loop of one model."""

    def generate_step(prompt: Any, model: nn.Module, *args: Any, **options: Any) -> Iterator[Any]:
        steps = stock(prompt, model, *args, **options)
        embeddings = options.get("input_embeddings")
        length = len(prompt) if embeddings is None else len(embeddings)
        return _kept(steps, model, options.get("prompt_cache"), length)

    return generate_step


def with_drafts(stock: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's loop with a draft model, whose own cache comes after the model's in the list."""

    def speculative_generate_step(prompt: Any, model: nn.Module, *args: Any, **options: Any) -> Iterator[Any]:
        steps, cache = stock(prompt, model, *args, **options), options.get("prompt_cache")
        own = cache[: len(model.layers)] if cache else None
        return _kept(steps, model, own, len(prompt))

    return speculative_generate_step


def _kept(steps: Iterator[Any], model: nn.Module, cache: list[Any] | None, length: int) -> Iterator[Any]:
    parts = leaves(cache or [])
    bounded = isinstance(cache, BoundedCache) or any(isinstance(part, BoundedKVCache) for part in parts)
    return closed_at_exit(_given(steps, model, cache, length)) if cache and bounded else steps


def _given(steps: Iterator[Any], model: nn.Module, cache: list[Any], length: int) -> Iterator[Any]:
    text, given, count = Text(model, cache, length), list[int](), 0
    try:
        for step in _on_their_stream(steps):
            given.append(int(step[0]))
            # nothing comes between this and giving it out
            count += 1
            yield step
    except UnsupportedFeatureError as error:
        # mlx-lm takes back drafts that a step which failed had not fed yet
        raise (error.__context__ or error) from None
    except BaseException as error:
        text.failed(error)
        raise
    finally:
        with _callers_stream():
            steps.close()  # type: ignore[attr-defined]
        text.end(given[:count])


def _on_their_stream(steps: Iterator[Any]) -> Iterator[Any]:
    """The loop's steps; whoever takes them has the default stream that was theirs.

    mlx-lm gives out its tokens with its own stream in force. Of two loops taken in turns each would put back
    the other's, and it would stay in force when both have ended.
    """
    theirs, thread = None, threading.get_ident()
    while True:
        with _callers_stream():
            if theirs is not None and thread == threading.get_ident():
                mx.set_default_stream(theirs)
            try:
                step = next(steps)
            except StopIteration:
                return
            theirs = mx.default_stream(mx.default_device())
        yield step


@contextmanager
def _callers_stream() -> Iterator[None]:
    """Put the default stream back in the end."""
    before = mx.default_stream(mx.default_device())
    try:
        yield
    finally:
        mx.set_default_stream(before)
