"""What :mod:`mlx_kvret.batching` asks of MLX: mlx-lm's own batch generator, and what goes into it."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

from . import hooks
from .api import stop_tokens
from .attaching import make_cache
from .cache import BoundedCache
from .generation import TokenIds, vocabulary
from .sampling import alone, processors_of

__all__ = [
    "alone",
    "checked_cache",
    "generator",
    "make_cache",
    "of_row",
    "processors_of",
    "reader",
    "vocabulary",
]

checked_cache = hooks.checked_cache


def generator(model: nn.Module, tokenizer: Any, rows: int, chunk: int) -> Any:
    """mlx-lm's, for so many rows at a time, which reads prompts by ``chunk`` tokens."""
    stops = [[token] for token in sorted(stop_tokens(model, tokenizer))]
    return BatchGenerator(
        model,
        stop_tokens=stops,
        completion_batch_size=rows,
        prefill_batch_size=rows,
        prefill_step_size=chunk,
    )


def reader(tokenizer: Any) -> Any:
    """A tokenizer, or what stands in for one."""
    return TokenIds() if tokenizer is None else tokenizer


def of_row(model: nn.Module, cache: list[Any]) -> BoundedCache:
    """The cache of a row that has ended, which goes on by itself."""
    return hooks.checked_cache(model, cache)
