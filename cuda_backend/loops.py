"""What loops leave in a bounded cache: the prompt and every token they gave out, however they end."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlx_kvret.errors import CacheError, ConfigError

from .cache import BoundedCache, cache_argument

GENERATE = "generate"
# what options of a cache begin with there: kvret_budget=512
PREFIX = "kvret_"
# an empty cache by the options of mlx_kvret.make_cache, or as the model was attached for
NewCache = Callable[[PreTrainedModel, dict[str, Any]], BoundedCache]


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


def prepare(model: PreTrainedModel, new_cache: NewCache) -> None:
    """Have ``model.generate`` read the last token too, which transformers leaves to the next call, and take
    the options of a cache: ``kvret_budget`` and the others of :func:`mlx_kvret.make_cache`."""

    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        asked = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
        if asked:
            _give(self, kwargs, asked, new_cache)
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


def _give(model: PreTrainedModel, kwargs: dict[str, Any], asked: dict[str, Any], new_cache: NewCache) -> None:
    """Put a cache among the arguments of ``generate``, as its options there say."""
    if (given := next((name for name in ("cache", "past_key_values") if kwargs.get(name)), None)) is not None:
        raise ConfigError(
            f"{next(iter(asked))} has no effect beside {given}, which was made before; drop one"
        )
    options = {name.removeprefix(PREFIX): value for name, value in asked.items()}
    kwargs |= cache_argument(model, new_cache(model, options))


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
