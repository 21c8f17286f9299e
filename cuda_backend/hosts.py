"""What transformers' ``generate`` is told before it begins: which cache it uses, and what that cannot do."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from mlx_kvret.errors import UnsupportedFeatureError

from . import loops
from .cache import BoundedCache, cache_name
from .loops import NewCache

PREPARE = "_prepare_cache_for_generation"


def renamed(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Give a bounded cache among keyword arguments the name that is read, in place.

    A model takes any others without a word, and would go on with a cache of its own.
    """
    name = cache_name(model)
    for key, value in list(kwargs.items()):
        if key != name and isinstance(value, BoundedCache):
            kwargs[name] = kwargs.pop(key)


def prepare(model: PreTrainedModel, new_cache: NewCache) -> None:
    """Have ``model.generate`` use ``new_cache(model, options)`` where it is given no cache."""

    def prepared(
        self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        renamed(self, model_kwargs)
        name = cache_name(self)
        given = model_kwargs.get(name)
        getattr(type(self), PREPARE)(self, generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(name)
        if given is None and made is not None:
            _check_own(generation_config, made)
            given = model_kwargs[name] = new_cache(self, {})
        if isinstance(given, BoundedCache) and given.shared is not None:
            _check(generation_config)

    vars(model)[PREPARE] = MethodType(prepared, model)
    loops.prepare(model, new_cache)


def release(model: PreTrainedModel) -> None:
    """Undo :func:`prepare`."""
    vars(model).pop(PREPARE, None)
    loops.release(model)


def _check_own(config: Any, made: Cache) -> None:
    """Refuse to put a bounded cache in the place of one that was asked for by name."""
    if type(made) is not DynamicCache or made.offloading:
        raise UnsupportedFeatureError(
            f"cache_implementation={config.cache_implementation!r} has no effect on a bounded model; drop "
            "it, or detach the model"
        )
    if config.is_assistant:
        raise UnsupportedFeatureError(
            "an attached model cannot draft for another: a compaction may come between its drafts, which "
            "must be taken back; detach it"
        )


def _check(config: Any) -> None:
    if (config.num_beams or 1) > 1:
        raise UnsupportedFeatureError("beam search does not work with a bounded cache; use num_beams=1")
    if config.use_cache is False:
        raise UnsupportedFeatureError(
            "use_cache=False reads everything again for each token, which a given cache would hold twice; "
            "drop one of both"
        )
