"""Tokens read into a cache without an answer, and a token taken back so that an answer can go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.prompts import check_ids
from ..errors import UnsupportedFeatureError
from . import hooks
from .cache import BoundedCache
from .entry import BoundedKVCache
from .forward import leaves
from .generation import vocabulary
from .seeing import Seen, check_no_pictures, taken
from .vision import speaking


def read_tokens(
    model: nn.Module,
    cache: BoundedCache,
    ids: Sequence[int] | Mapping[str, Any],
    step: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read token ids, ``step`` at a time; ``progress`` is told how many of how many are read.

    With pictures they come as what a processor made of text and pictures.

    Each step is read or, whatever ends it, not; ``cache.seen`` tells how many were.

    Raises:
        ConfigError: an id outside of the vocabulary.
        OutOfMemoryError, CacheError, ModelMismatchError: as the model's own calls.
    """
    cache = hooks.checked_cache(model, cache)
    if isinstance(ids, Mapping):
        prompt = taken(ids)
        check_ids(prompt.tokens, vocabulary(model))
        seen = Seen(model, prompt)
        seen.read(cache, step, progress)
        seen.finish(cache)
        cache.settle()
        if progress is not None:
            progress(len(prompt.tokens), len(prompt.tokens))
        return
    check_ids(ids, vocabulary(model))
    check_no_pictures(model, ids)
    reader = speaking(model)
    for start in range(0, len(ids), step):
        if progress is not None:
            progress(start, len(ids))
        reader(mx.array([ids[start : start + step]]), cache=cache)
        # as mlx-lm does between the chunks of a prompt
        mx.clear_cache()
    cache.settle()
    if progress is not None:
        progress(len(ids), len(ids))


def take_back(cache: BoundedCache, count: int) -> bool:
    """Forget the newest ``count`` tokens; False, and nothing happened, where it is too late for that."""
    parts = leaves(cache)
    others = [part for part in parts if not isinstance(part, BoundedKVCache)]
    if not all(part.is_trimmable() for part in others):
        return False
    try:
        # bounded layers refuse before the first of them has changed
        for part in [part for part in parts if isinstance(part, BoundedKVCache)]:
            part.trim(count)
    except UnsupportedFeatureError:
        return False
    for part in others:
        part.trim(count)
    return True
