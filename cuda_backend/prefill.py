"""Tokens read into a cache without an answer, and a token taken back so that an answer can go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.prompts import check_ids
from mlx_kvret.errors import UnsupportedFeatureError

from . import hooks
from .cache import BoundedCache, cache_argument
from .generation import vocabulary
from .memory import explained
from .seeing import Prepared, Seen, taken


@torch.no_grad()
def read_tokens(
    model: PreTrainedModel,
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
    hooks.check_cache(model, cache)
    if isinstance(ids, Mapping):
        _read_seen(model, cache, taken(model, ids), step, progress)
        return
    check_ids(ids, vocabulary(model))
    row, given = torch.tensor([list(ids)], device=model.device), cache_argument(model, cache)
    with explained(model, cache, row, step):
        for start in range(0, len(ids), step):
            if progress is not None:
                progress(start, len(ids))
            model(row[:, start : start + step], **given, logits_to_keep=1)
    cache.settle()
    if progress is not None:
        progress(len(ids), len(ids))


def _read_seen(
    model: PreTrainedModel,
    cache: BoundedCache,
    prompt: Prepared,
    step: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    check_ids(prompt.tokens, vocabulary(model))
    with explained(model, cache, prompt.ids, step):
        seen = Seen(model, prompt)
        seen.read(cache, step, progress)
        seen.finish(cache)
    cache.settle()
    if progress is not None:
        progress(len(prompt.tokens), len(prompt.tokens))


def take_back(cache: BoundedCache, count: int) -> bool:
    """Forget the newest ``count`` tokens; False, and nothing happened, where it is too late for that."""
    try:
        cache.crop(-count)
    except (UnsupportedFeatureError, ValueError, RuntimeError, NotImplementedError):
        return False
    return True
