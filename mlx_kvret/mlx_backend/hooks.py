"""Attach to a stock mlx-lm model: nothing is forked, and detaching restores it completely.

Three hooks. Attention instances get a subclass that shows their input to the cache. Their module's
``scaled_dot_product_attention`` hands calls for a bounded cache to that cache. The model gets a subclass
whose ``make_cache`` returns bounded caches, so that every mlx-lm entry point uses them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as mlx_cache

from ..core.advice import reach_of
from ..core.config import EvictionConfig
from ..core.fingerprint import check_identity
from ..core.machine import check_fits
from ..core.request import NO_GATES, own_eviction
from ..core.shares import check_seeing
from ..core.snapshot import Snapshot
from ..core.vision import check_vision
from ..errors import (
    ConfigError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from . import hosts, pictures
from .agreement import check_agreement, check_rows
from .attachment import Attachment, Namespaces, attachment
from .cache import BoundedCache
from .dispatch import give_back, take_over
from .entry import BoundedKVCache
from .forward import leaves, run
from .gates import RetentionGates
from .memory import free_bytes
from .probe import probe
from .ranks import is_split, split_of
from .snapshots import reopen
from .vision import family, forgetful, is_vision, speaking, tokens_of_pictures

ATTENTION = "scaled_dot_product_attention"
REFUSED = {
    "afm7": "it takes RoPE offsets from the number of cached keys",
    "phi3small": "it builds its mask from the number of cached keys",
    "iquestloopcoder": "it keeps a second cache whose entries must match the first one's",
    "gemma2": "it computes attention by hand instead of calling mlx-lm's attention function",
    "olmo": "it computes attention by hand instead of calling mlx-lm's attention function",
    "plamo2": "it calls MLX's attention directly instead of mlx-lm's function",
    "deepseek_v41": "it calls MLX's attention directly instead of mlx-lm's function",
}


def install(
    model: nn.Module,
    gates: RetentionGates | None,
    owner: dict[str, str],
    options: dict[str, Any] | None = None,
    compute: bool = True,
) -> Attachment:
    """Hook a model that is not hooked yet; ``options`` are those of the caches it makes itself.

    Of a vision-language model it is the language model that is hooked. Its logits are compared with its own
    unless ``compute`` is False.

    Raises:
        ConfigError: ``options`` cannot work.
        UnsupportedModelError: its attention cannot be hooked without giving wrong results.
    """
    check_vision(name := family(model))
    if is_vision(model):
        check_seeing(is_split(model))
    name = name or getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]
    eyes, model = tokens_of_pictures(model), speaking(model)
    with forgetful(model):
        return _install(model, name, gates, owner, options, compute, eyes)


def _install(
    model: nn.Module,
    name: str,
    gates: RetentionGates | None,
    owner: dict[str, str],
    options: dict[str, Any] | None,
    compute: bool,
    eyes: frozenset[int],
) -> Attachment:
    module = type(language_model(model)).__module__.rpartition(".")[2]
    for refused in (name, module):
        if why := REFUSED.get(refused):
            raise UnsupportedModelError(f"{refused} models cannot be bounded: {why}; use another model")
    attentions = list(attention_modules(model))
    if not attentions:
        raise UnsupportedModelError(f"{name} models have no attention with a KV cache; nothing to bound")
    for attention in attentions:
        _check(attention, name)
        if "_kvret_hook" in type(attention).__dict__:
            raise UnsupportedModelError(
                f"this {name} model is a part of one that is attached, or has such a part; use that one, or "
                "detach it first"
            )
    namespaces = _swap_attention(attentions)
    try:
        latent = any(hasattr(attention, "kv_lora_rank") for attention in attentions)
        layout = probe(model, _stock_cache(model), name, latent)
        places = [index for index, _ in layout.places]
        split = split_of(model, layout.shape, layout.latent, places, name)
        layout = replace(layout, split=split, reach=reach_of(_arguments(model)))
        if gates is not None:
            gates.stack(layout.check_gates(gates))
        own = own_eviction(layout.whole, None if gates is None else gates.config, options or {})
        layout.check_bits(own.kv_bits)
    except BaseException:
        _restore_attention(attentions, namespaces)
        raise
    made = Attachment(layout, gates, owner, namespaces, own, eyes)
    # frequencies and the like, which loading leaves to be computed, as another thread could not
    held = [(name, value) for module in model.modules() for name, value in module.items()]
    mx.eval([value for name, value in held if name.startswith("_") and isinstance(value, mx.array)])
    _swap_model(model, made)
    if compute:
        try:
            stock, bounded = functools.partial(_stock_cache, model), functools.partial(new_cache, model, made)
            check_agreement(model, layout, stock, bounded, name)
        except BaseException:
            remove(model)
            raise
    return made


def _arguments(model: nn.Module) -> dict[str, Any]:
    """What the model's part that speaks was made from."""
    return getattr(getattr(model, "args", None) or getattr(model, "config", None), "__dict__", {})


def remove(model: nn.Module) -> None:
    """Undo :func:`install`; a model without hooks stays as it is."""
    made, model = attachment(model), speaking(model)
    if made is None:
        return
    _restore_attention(list(attention_modules(model)), made.namespaces)
    model.__class__ = type(model).__mro__[1]
    del model.__dict__["_kvret"]


def new_cache(model: nn.Module, made: Attachment, config: EvictionConfig) -> BoundedCache:
    """An empty cache for an attached model.

    Raises:
        ConfigError: the policy needs gates and there are none, or the budget is beyond the machine.
    """
    if config.policy == "learned" and made.gates is None:
        raise ConfigError(NO_GATES)
    share, fits = made.layout.share, functools.partial(check_fits, made.layout.shape, config, free_bytes())
    if share is None:
        fits()
    else:
        share.ranks.agreed(fits)
    _dispatch(made.namespaces)
    cache = made.layout.bounded_cache(_stock_cache(model), config, made.gates, made.owner)
    cache.identity = made.identity(model)
    return cache


def checked_cache(model: nn.Module, given: list[Any]) -> BoundedCache:
    """A cache to go on with: one of ours for this model, or layers that mlx-lm has kept or read from a file.

    Raises:
        ConfigError: it is something else.
        ModelMismatchError: it belongs to another model or other gates.
    """
    made = attachment(model)
    if made is None or not isinstance(given, list):
        raise ConfigError(
            f"cache is a {type(given).__name__}, the model {'not ' if made is None else ''}attached; "
            "make the cache with mlx_kvret.make_cache(model)"
        )
    cache = given if isinstance(given, BoundedCache) else made.layout.extracted(given)
    if cache is None:
        cache = made.layout.reopened(given, made.gates, made.owner)
        cache.identity = made.identity(model)
    cache.passes.check()
    check_identity(made.identity(model), cache.identity)
    return cache


def row_cache(model: nn.Module, entries: list[Any]) -> BoundedCache:
    """The cache of a row that has left a batch; entries of policy ``"full"`` bear no mark of ours."""
    made = attachment(model)
    if made is None or any(isinstance(part, BoundedKVCache) for part in leaves(entries)):
        return checked_cache(model, entries)
    cache = made.layout.full(entries)
    cache.identity = made.identity(model)
    return cache


def rows_agree(model: nn.Module) -> bool:
    """Whether rows of an attached vision-language model decode together as each does alone; tried once."""
    made = attachment(model)
    if made is None:
        return False
    if made.rows is None:
        name, model = family(model), speaking(model)
        stock, bounded = functools.partial(_stock_cache, model), functools.partial(new_cache, model, made)
        with forgetful(model):
            made.rows = check_rows(model, made.layout, stock, bounded, name)
    return made.rows


def _identity_of(cache: list[Any]) -> str | None:
    """That of a bounded cache, or of the entries of one; None for a stock cache."""
    if isinstance(cache, BoundedCache):
        return cache.identity
    return next((part.shared.identity for part in leaves(cache) if isinstance(part, BoundedKVCache)), None)


def reopened_cache(model: nn.Module, snapshot: Snapshot) -> BoundedCache:
    """A cache that goes on where a snapshot was taken. Raises as :func:`.snapshots.reopen`."""
    made = attachment(model)
    if made is None:
        raise ConfigError("the model is not attached; call mlx_kvret.attach(model, gates) first")
    cache = reopen(snapshot, made, _stock_cache(model))
    cache.identity = made.identity(model)
    return cache


def _stock_cache(model: nn.Module) -> list[Any]:
    model = speaking(model)
    stock = type(model).__mro__[1] if attachment(model) else type(model)
    if hasattr(stock, "make_cache"):
        return list(stock.make_cache(model))
    return [mlx_cache.KVCache() for _ in model.layers]


def language_model(model: nn.Module) -> nn.Module:
    """The text model: of a vision-language model the part that makes text."""
    inner: Any = getattr(model, "language_model", model)
    return inner


# ---------------------------------------------------------------- attention


def attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose ``__call__`` feeds a KV cache."""
    for module in model.modules():
        if not callable(module):
            continue
        cls = _stock_class(module)
        code = getattr(inspect.unwrap(cls.__call__), "__code__", None)
        if code and "cache" in code.co_varnames and "update_and_fetch" in _names(cls, code):
            yield module


def _names(cls: type, code: Any) -> set[str]:
    """The names that a module's call uses, or a method of its own that it calls."""
    helpers = (inspect.getattr_static(cls, name, None) for name in code.co_names)
    own = [helper.__code__.co_names for helper in helpers if inspect.isfunction(helper)]
    return {*code.co_names}.union(*own)


def _stock_class(module: nn.Module) -> type:
    cls = type(module)
    return cls.__mro__[1] if "_kvret_hook" in cls.__dict__ else cls


def _check(attention: nn.Module, name: str) -> None:
    call = inspect.unwrap(type(attention).__call__)
    if ATTENTION not in call.__code__.co_names or ATTENTION not in call.__globals__:
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: {type(attention).__name__} does not call mlx-lm's "
            f"{ATTENTION}; use another model"
        )
    if hasattr(attention, "indexer"):
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: an indexer picks cached tokens by place; use another model"
        )


@functools.cache
def _hooked(cls: type) -> type:
    """A subclass of an attention class that shows its input to the cache first."""
    stock = cls.__call__
    _, *names = inspect.signature(inspect.unwrap(stock)).parameters

    @functools.wraps(stock)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        cache: Any = given.get("cache")
        # some attentions are given a CacheList and pick their entry themselves
        for entry in getattr(cache, "caches", (cache,)):
            if entry is not None and hasattr(entry, "observe"):
                entry.observe(given[names[0]])
        return stock(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "_kvret_hook": True})


def _swap_attention(attentions: list[nn.Module]) -> Namespaces:
    found = [inspect.unwrap(type(attention).__call__).__globals__ for attention in attentions]
    namespaces = Namespaces(list({id(namespace): namespace for namespace in found}.values()))
    _dispatch(namespaces)
    for attention in attentions:
        attention.__class__ = _hooked(type(attention))
    return namespaces


def _restore_attention(attentions: list[nn.Module], namespaces: Namespaces) -> None:
    for attention in attentions:
        attention.__class__ = _stock_class(attention)
    for namespace in namespaces.attentions:
        give_back(namespace, ATTENTION, namespaces)
    hosts.release(namespaces)


def _dispatch(namespaces: Namespaces) -> None:
    """Have mlx-lm's functions treat bounded caches as they need it for as long as ``namespaces`` lives."""
    for namespace in namespaces.attentions:
        take_over(namespace, ATTENTION, _attention, namespaces)
    hosts.prepare(namespaces)


def _attention(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Hand bounded caches the calls of a model file's attention function; inert for all others."""

    def attention(queries: Any, keys: Any, values: Any, cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        owner = (
            cache if hasattr(cache, "attend") else BoundedKVCache.owner_of(keys) if cache is None else None
        )
        if owner is None:
            return stock(queries, keys, values, cache, *args, **kwargs)
        return owner.attend(queries, keys, values, *args, **kwargs)

    return attention


# ---------------------------------------------------------------- the model


def _swap_model(model: nn.Module, made: Attachment) -> None:
    cls = type(model)
    _, _, *names = inspect.signature(inspect.unwrap(cls.__call__)).parameters
    # a model may be a copy: what is attached is asked of it each time, and its hooks are its own

    def make_cache(self: nn.Module) -> BoundedCache:
        # mlx-lm drops this option without a word where a model makes its own caches
        if sys._getframe(1).f_locals.get("max_kv_size") is not None:
            raise UnsupportedFeatureError(
                "max_kv_size has no effect on a bounded model; drop it and give a cache from "
                "mlx_kvret.make_cache(model, budget=...)"
            )
        mine: Attachment = self.__dict__["_kvret"]
        return new_cache(self, mine, mine.eviction)

    @functools.wraps(cls.__call__)
    def call(self: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if is_vision(self):
            # their order differs from model to model
            args, kwargs = (), dict(zip(names, args, strict=False)) | kwargs
        cache = kwargs.get("cache", args[0] if args else None)
        if not isinstance(cache, list):
            return cls.__call__(self, inputs, *args, **kwargs)
        mine: Attachment = self.__dict__["_kvret"]
        _dispatch(mine.namespaces)
        joined = mine.layout.join(cache, mine.gates, mine.owner)
        if joined is not None:
            joined.arena.identity = mine.identity(self)
        found = _identity_of(cache)
        if found is None:
            return cls.__call__(self, inputs, *args, **kwargs)
        check_identity(mine.identity(self), found)
        if is_vision(self):
            return pictures.run_seeing(self, mine.eyes, cls.__call__, cache, inputs, kwargs)
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
        tokens = max(a.shape[1] for a in (inputs, *given) if a is not None and a.ndim > 1)

        def forward(count: int) -> Any:
            return cls.__call__(self, inputs if count == tokens else inputs[:, :count], *args, **kwargs)

        return run(cache, tokens, forward, sliced=not given)

    hooked = type(
        cls.__name__, (cls,), {"make_cache": make_cache, "__call__": call, "__module__": cls.__module__}
    )
    model.__class__ = hooked
    model.__dict__["_kvret"] = made
