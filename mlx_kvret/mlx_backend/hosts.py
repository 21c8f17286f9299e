"""What mlx-lm's generation asks of a cache beyond calling it, answered for bounded layers; inert for others.

``is_trimmable`` is asked by prefix caches, which then take back any number of tokens, and by speculative
decoding, which takes back drafts of the last forward pass only. A bounded layer says yes to the first alone,
so the second gets functions of its own, in mlx-lm's generation module, which nobody else reads them from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import mlx_lm

from ..errors import CacheError, MissingDependencyError, UnsupportedFeatureError
from . import loops, vlm_hosts
from .dispatch import User, give_back, take_over
from .entry import BoundedCacheList, BoundedKVCache
from .saved import Loaded

# the package's attribute of this name is a function
GENERATION = vars(importlib.import_module("mlx_lm.generate"))


def can_take_back(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Speculative decoding asks at its start: bounded layers can, by their newest tokens."""

    def can_trim_prompt_cache(cache: list[Any]) -> bool:
        return bool(stock([part for part in _parts(cache) if not isinstance(part, BoundedKVCache)]))

    return can_trim_prompt_cache


def take_back(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Speculative decoding takes back drafts that were not accepted, and does not look at what came of it."""

    def trim_prompt_cache(cache: list[Any], num_tokens: int) -> int:
        parts = _parts(cache)
        if not any(isinstance(part, BoundedKVCache) for part in parts):
            return int(stock(cache, num_tokens))
        others = [part for part in parts if not isinstance(part, BoundedKVCache)]
        if num_tokens and not all(part.is_trimmable() for part in others):
            raise CacheError(
                f"cannot take back {num_tokens} drafted tokens: a sliding-window or state-space layer has "
                "dropped what came before them; generate without a draft model"
            )
        taken = [int(part.trim(num_tokens)) for part in parts]
        return taken[0]

    return trim_prompt_cache


def refuse_bits(stock: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm passes over caches that have no ``to_quantized``, without a word."""

    def maybe_quantize_kv_cache(
        prompt_cache: list[Any], quantized_kv_start: int, kv_group_size: int, kv_bits: int | None
    ) -> None:
        if kv_bits is not None and any(isinstance(part, BoundedKVCache) for part in _parts(prompt_cache)):
            raise UnsupportedFeatureError(
                f"kv_bits={kv_bits} of mlx-lm's functions does not work with a bounded cache; give it to "
                "mlx_kvret.attach, make_cache or generate, which store entries in few bits as they are kept"
            )
        stock(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)

    return maybe_quantize_kv_cache


def check_batch(stock: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm names the class that has no ``merge``, but neither why nor what to do."""

    def _merge_caches(caches: list[list[Any]]) -> list[Any]:
        for parts in zip(*map(_parts, caches), strict=False):
            bounded = [isinstance(part, BoundedKVCache) for part in parts]
            if any(isinstance(part, Loaded) for part in parts):
                raise UnsupportedFeatureError(
                    "a cache as mlx-lm reads it from a file cannot join a batch; have the model read a "
                    "token into it alone first, or open it with mlx_kvret.load_cache"
                )
            if any(bounded) and not all(bounded):
                raise UnsupportedFeatureError(
                    "a batch of bounded and of full caches does not work; make all caches of a batch with "
                    "policies that evict, or none"
                )
            if any(bounded) and not all(hasattr(part, "merge") for part in parts):
                raise UnsupportedFeatureError(
                    "batched generation does not work with a bounded cache of this model, whose attention "
                    "computes on cached keys (latent attention); run one sequence at a time"
                )
        if any(isinstance(entry, BoundedCacheList) for cache in caches for entry in cache):
            raise UnsupportedFeatureError(
                "batched generation does not work with a bounded cache of this model, whose layers keep "
                "a state beside it; run one sequence at a time"
            )
        merged: list[Any] = stock(caches)
        return merged

    return _merge_caches


REPLACED = {
    "generate_step": loops.alone,
    "speculative_generate_step": loops.with_drafts,
    "can_trim_prompt_cache": can_take_back,
    "trim_prompt_cache": take_back,
    "maybe_quantize_kv_cache": refuse_bits,
    "_merge_caches": check_batch,
}


def prepare(user: User) -> None:
    """Have mlx-lm's generation treat bounded caches as they need it, for as long as ``user`` is attached.

    Raises:
        MissingDependencyError: a release of mlx-lm that does not have these functions.
    """
    if missing := REPLACED.keys() - GENERATION.keys():
        raise MissingDependencyError(
            f"mlx-lm {mlx_lm.__version__} generates without {', '.join(sorted(missing))}, which bounded "
            "caches need; run `pip install 'mlx-lm>=0.32,<0.33'`"
        )
    for name, replacement in REPLACED.items():
        take_over(GENERATION, name, replacement, user)
    vlm_hosts.prepare(user)


def release(user: User) -> None:
    """Undo :func:`prepare`."""
    for name in REPLACED:
        give_back(GENERATION, name, user)
    vlm_hosts.release(user)


def _parts(cache: list[Any]) -> list[Any]:
    """The entries of a prompt cache, those of nested lists one by one."""
    return [part for entry in cache for part in getattr(entry, "caches", (entry,))]
