"""Serving on MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.picture_prompts import processor_of
from ..core.types import Array
from ..mlx_backend import hooks, snapshots
from ..mlx_backend.api import competing, processed
from ..mlx_backend.attaching import make_cache
from ..mlx_backend.batching import BatchGenerator
from ..mlx_backend.cache import BoundedCache
from ..mlx_backend.generation import vocabulary
from ..mlx_backend.memory import free_bytes
from ..mlx_backend.sampling import alone, of_first
from ..mlx_backend.seeing import Seen, Speaker, reader_of, taken
from ..mlx_backend.vision import can_see, is_vision, speaking, tokens_of_pictures
from .channels import Splitter
from .common import Common, Rooms
from .marks import splitter, wrapped


class OnMLX(Common):
    """As :class:`.backend.Backend`."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        draw = alone, of_first, greedy
        rooms = Rooms(hooks, snapshots, make_cache, competing, vocabulary, BatchGenerator, *draw, _batches)
        super().__init__(rooms, model, options)
        self._processor, self._marked, reader = processor_of(tokenizer), tokenizer, tokenizer
        self._speaker = model
        if is_vision(model):
            self._speaker = Speaker(speaking(model))
            self.batches = self.batches and hooks.rows_agree(model)
            # the former has the model's end tokens, the latter a parser of tool calls
            reader, self._marked = reader_of(model, tokenizer), wrapped(tokenizer)
        sees = can_see(model) and self._processor is not tokenizer
        self.eyes = tokens_of_pictures(model) if sees else frozenset()
        self.ends = frozenset(int(token) for token in reader.eos_token_ids)

    def read(self, cache: BoundedCache, ids: list[int]) -> None:
        self._speaker(mx.array([ids]), cache=cache)
        # as mlx-lm does between chunks
        mx.clear_cache()

    def processed(self, text: str, pictures: list[Any]) -> dict[str, Any]:
        made = processed(self.model, self._processor, text, pictures)
        # an array of MLX may be unfinished work of the thread that made it
        return {name: _on_host(value) for name, value in made.items()}

    def looking(self, cache: BoundedCache, made: dict[str, Any], chunk: int) -> Iterator[int]:
        return Seen(self.model, taken(made)).chunks(cache, chunk)

    def decoder(self, cache: BoundedCache) -> Callable[[mx.array], mx.array]:
        def logprobs(token: mx.array) -> mx.array:
            logits = self._speaker(token[None], cache=cache)[:, -1]
            return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

        return logprobs

    def host(self, logprobs: mx.array) -> Array:
        return np.array(logprobs.astype(mx.float32))

    def array(self, token: int) -> mx.array:
        return mx.array([token])

    def row(self, found: Any) -> BoundedCache:
        return hooks.checked_cache(self.model, found[0])

    def splitter(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> Splitter:
        return splitter(self._marked, ids, tools)

    def free_bytes(self) -> int | None:
        return free_bytes()


def _batches(cache: BoundedCache) -> bool:
    return all(hasattr(entry, "merge") for entry in cache)


def _on_host(value: Any) -> Any:
    if not isinstance(value, mx.array):
        return value
    return np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)


def greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
