"""What :mod:`mlx_kvret.batching` asks of torch: the backend's batch generator, and what goes into it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from . import hooks
from .attaching import make_cache
from .batch import BatchGenerator
from .cache import BoundedCache
from .generation import TokenIds, stop_tokens, vocabulary
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


def checked_cache(model: PreTrainedModel, cache: BoundedCache) -> BoundedCache:
    """A cache that the model can go on with. Raises as :func:`.hooks.check_cache`."""
    hooks.check_cache(model, cache)
    return cache


def generator(model: PreTrainedModel, tokenizer: Any, rows: int, chunk: int) -> BatchGenerator:
    """For so many rows at a time, which reads prompts by ``chunk`` tokens."""
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


def of_row(model: PreTrainedModel, cache: BoundedCache) -> BoundedCache:
    """The cache of a row that has ended, which goes on by itself."""
    return cache
