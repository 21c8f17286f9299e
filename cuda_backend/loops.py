"""What loops leave in a bounded cache: the prompt and every token they gave out, however they end."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlx_kvret.errors import CacheError

from .cache import BoundedCache, cache_argument

GENERATE = "generate"


def end_text(cache: BoundedCache, tokens: int) -> None:
    """A loop that feeds each token before it gives it out ends: the cache is to hold just ``tokens``.

    Of a prompt that was broken off it holds what was read.
    """
    cache.passes.repair()
    extra = cache.seen - tokens
    if extra > 0 and not cache.lost and not cache.take_back(extra):
        cache.lose(
            f"{extra} tokens were read that nobody was given, and cannot be taken back from a sliding "
            "window, a state or a compaction"
        )


def prepare(model: PreTrainedModel) -> None:
    """Have ``model.generate`` read the last token too, which transformers leaves to the next call."""

    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        cache = next((v for v in kwargs.values() if isinstance(v, BoundedCache)), None)
        inputs = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        ids = next((value for value in inputs if value is not None), None)
        if cache is not None and ids is not None:
            _check_new(cache, ids.shape[1])
        stock: Any = getattr(type(self), GENERATE)
        out = stock(self, *args, **kwargs)
        text = out if isinstance(out, torch.Tensor) else out.sequences
        if cache is None and not isinstance(out, torch.Tensor):
            cache = next((v for v in out.values() if isinstance(v, BoundedCache)), None)
        if cache is not None:
            embeddings = kwargs.get("inputs_embeds")
            before = 0 if embeddings is None or ids is not None else embeddings.shape[1]
            _read_rest(self, cache, text, before + text.shape[1] - cache.seen)
        return out

    vars(model)[GENERATE] = MethodType(generate, model)


def release(model: nn.Module) -> None:
    """Undo :func:`prepare`."""
    vars(model).pop(GENERATE, None)


def _check_new(cache: BoundedCache, tokens: int) -> None:
    """transformers wants the whole text so far, of which the cache holds a beginning."""
    if tokens < cache.seen:
        raise CacheError(
            f"generate was given {tokens:,} tokens and a cache that has seen {cache.seen:,}; give the whole "
            "text so far, what the cache holds and what is new"
        )
    # of a text that is there already the last token is read once more, for what comes after it
    if tokens == cache.seen > 0 and not cache.take_back(1):
        raise CacheError(f"the cache holds all of the {tokens:,} tokens; give at least one that is new")


@torch.no_grad()
def _read_rest(model: PreTrainedModel, cache: BoundedCache, text: torch.Tensor, count: int) -> None:
    if not 0 < count <= text.shape[1]:
        return
    given: dict[str, Any] = dict(cache_argument(model, cache))
    if cache.shared is None and len(cache.competing[0].keys) != len(text):
        return  # it holds beams, only the best of which were given out
    model(text[:, -count:], **given)
