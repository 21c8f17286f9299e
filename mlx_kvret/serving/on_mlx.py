"""Serving on MLX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from ..core.types import Array
from ..mlx_backend import hooks, snapshots
from ..mlx_backend.api import competing
from ..mlx_backend.attaching import make_cache
from ..mlx_backend.cache import BoundedCache
from ..mlx_backend.generation import vocabulary
from ..mlx_backend.memory import free_bytes
from ..mlx_backend.sampling import alone
from .channels import Splitter
from .common import Common, Rooms
from .marks import splitter


class OnMLX(Common):
    """As :class:`.backend.Backend`."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        rooms = Rooms(
            hooks, snapshots, make_cache, competing, vocabulary, BatchGenerator, alone, greedy, _batches
        )
        super().__init__(rooms, model, options)
        self.ends = frozenset(int(token) for token in tokenizer.eos_token_ids)

    def read(self, cache: BoundedCache, ids: list[int]) -> None:
        self.model(mx.array([ids]), cache=cache)
        # as mlx-lm does between chunks
        mx.clear_cache()

    def decoder(self, cache: BoundedCache) -> Callable[[mx.array], mx.array]:
        def logprobs(token: mx.array) -> mx.array:
            logits = self.model(token[None], cache=cache)[:, -1]
            return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

        return logprobs

    def host(self, logprobs: mx.array) -> Array:
        return np.array(logprobs.astype(mx.float32))

    def array(self, token: int) -> mx.array:
        return mx.array([token])

    def row(self, found: Any) -> BoundedCache:
        return hooks.checked_cache(self.model, found[0])

    def splitter(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> Splitter:
        return splitter(tokenizer, ids, tools)

    def free_bytes(self) -> int | None:
        return free_bytes()


def _batches(cache: BoundedCache) -> bool:
    return all(hasattr(entry, "merge") for entry in cache)


def greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
