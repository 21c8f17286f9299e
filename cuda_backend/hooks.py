"""Attach to a stock transformers model: nothing is forked, and detaching restores it completely.

Three hooks. Attention modules show their input to the cache before they run. An attention function and a
mask function in transformers' registries hand calls for bounded caches to these, and all others to the
model's own. The decoder announces each forward pass to its cache, and undoes it there if it was broken off.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.fingerprint import check_identity
from mlx_kvret.core.machine import check_fits
from mlx_kvret.core.request import NO_GATES, eviction, own_eviction
from mlx_kvret.core.shares import check_seeing
from mlx_kvret.core.snapshot import Snapshot
from mlx_kvret.errors import CacheError, ConfigError, UnsupportedFeatureError, UnsupportedModelError

from . import hosts, pictures, positions
from .attachment import Attachment, attachment
from .bounded import Bounded
from .cache import BoundedCache, BoundedKVCache, running
from .fixed import current
from .forward import unwrap, wrap
from .gates import RetentionGates
from .memory import free_bytes
from .modes import ordinary
from .modules import attention_modules
from .pictures import Eyes
from .probe import layout_of, probe, stock_layers
from .ranks import is_split
from .rope import Fixed, fix
from .snapshots import reopen

# what names of our attention functions begin with
NAME = "kvret_"


def install(
    model: PreTrainedModel,
    gates: RetentionGates | None,
    owner: dict[str, str],
    options: dict[str, Any] | None = None,
) -> Attachment:
    """Hook a model that is not hooked yet; ``options`` are those of the caches it makes itself.

    Raises:
        ConfigError: ``options`` cannot work.
        UnsupportedModelError: its attention cannot be hooked without giving wrong results.
    """
    eyes = Eyes.of(model)
    if eyes is not None:
        check_seeing(is_split(model))
    stock = model.config._attn_implementation
    hidden: dict[int, int] = {}
    handles = _observers(model, hidden)
    decoder, rope = model.get_decoder(), Fixed()
    for module in (decoder, model) if decoder is not model else (model,):
        wrap(
            module,
            partial(_check, eyes) if module is model else None,
            partial(_begin, eyes) if module is decoder else None,
        )
    try:
        rope = fix(model, vars(model).get("_kvret_rope_length"))
        hooked = partial(model.set_attn_implementation, implementation(stock))
        if eyes is None:
            layout = probe(model, hooked, hidden)
        else:
            positions.prepare(model, eyes)
            with eyes.closed():
                layout = probe(model, hooked, hidden)
        if gates is not None:
            gated = layout.check_gates(gates)
            gates.to(layout.device).stack(gated)
        own = own_eviction(layout.whole, None if gates is None else gates.config, options or {})
    except BaseException:
        _unhook(model, handles, stock, eyes)
        rope.restore(model)
        raise
    if rope.mark:
        owner = owner | {"model": owner.get("model", "") + rope.mark}
    made = Attachment(layout, gates, owner, own, stock, rope, eyes, handles)
    vars(model)["_kvret"] = made
    hosts.prepare(model, asked_cache)
    return made


def remove(model: PreTrainedModel) -> None:
    """Undo :func:`install`; a model without hooks stays as it is."""
    made = attachment(model)
    if made is not None:
        _unhook(model, made.handles, made.implementation, made.eyes)
        made.rope.restore(model)
        hosts.release(model)
        del vars(model)["_kvret"]


@ordinary
def new_cache(model: PreTrainedModel, made: Attachment, config: EvictionConfig) -> BoundedCache:
    """An empty cache for an attached model.

    Raises:
        ConfigError: the policy needs gates and there are none, or the budget is beyond the machine.
    """
    if config.policy == "learned" and made.gates is None:
        raise ConfigError(NO_GATES)
    layout = made.layout
    fits = partial(check_fits, layout.shape, config, free_bytes(layout.device))
    if layout.share is None:
        fits()
    else:
        layout.share.ranks.agreed(fits)
    cache = made.layout.bounded_cache(stock_layers(model), config, made.gates, made.owner)
    cache.identity = made.identity(model)
    return cache


def check_cache(model: PreTrainedModel, cache: Any) -> None:
    """Refuse a cache that the model cannot go on with.

    Raises:
        ConfigError: it is none of ours, or the model is not attached.
        ModelMismatchError: it belongs to another model or other gates.
        CacheError: it cannot go on.
    """
    made = attachment(model)
    if made is None or not isinstance(cache, BoundedCache):
        raise ConfigError(
            f"cache is a {type(cache).__name__}, the model {'not ' if made is None else ''}attached; "
            "make the cache with mlx_kvret.make_cache(model)"
        )
    cache.passes.check()
    check_identity(made.identity(model), cache.identity)


def asked_cache(model: PreTrainedModel, options: dict[str, Any]) -> BoundedCache:
    """An empty cache for an attached model, by the options of :func:`mlx_kvret.make_cache`, or as it was
    attached for if there are none: what its ``generate`` uses where it is given no cache.

    Raises:
        ConfigError: options that cannot work.
    """
    made = attachment(model)
    assert made is not None
    if not options:
        return new_cache(model, made, made.eviction)
    return new_cache(model, made, eviction(made.layout.whole, gates=made.gate_config, **options))


def shape_of(model: PreTrainedModel) -> CacheShape:
    """What a model's bounded layers cache; the model may be on the meta device, without weights."""
    hidden: dict[int, int] = {}
    handles = _observers(model, hidden)
    try:
        return layout_of(model, hidden).shape
    finally:
        for handle in handles:
            handle.remove()


def _observers(model: PreTrainedModel, hidden: dict[int, int]) -> list[Any]:
    modules = attention_modules(model)
    if not modules:
        name = model.config.model_type
        raise UnsupportedModelError(f"{name} models have no attention with a KV cache; nothing to bound")
    return [
        module.register_forward_pre_hook(partial(_observe, hidden), with_kwargs=True)
        for module in modules.values()
    ]


@ordinary
def reopened_cache(model: PreTrainedModel, snapshot: Snapshot) -> BoundedCache:
    """A cache that goes on where a snapshot was taken. Raises as :func:`cuda_backend.snapshots.reopen`."""
    made = attachment(model)
    if made is None:
        raise ConfigError("the model is not attached; call mlx_kvret.attach(model, gates) first")
    cache = reopen(snapshot, made, stock_layers(model))
    cache.identity = made.identity(model)
    return cache


def _unhook(model: PreTrainedModel, handles: list[Any], stock: str, eyes: Eyes | None) -> None:
    for handle in handles:
        handle.remove()
    if eyes is not None:
        positions.release(model, eyes)
    for module in {id(module): module for module in (model, model.get_decoder())}.values():
        unwrap(module)
    model.set_attn_implementation(stock)


# ---------------------------------------------------------------- one forward pass


def _bounded(args: Any, kwargs: dict[str, Any]) -> BoundedCache | None:
    """The bounded cache among a module's arguments, whatever its name there."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, BoundedCache)]
    return found[0] if found else None


def _check(eyes: Eyes | None, model: Any, cache: BoundedCache, args: Any, kwargs: dict[str, Any]) -> None:
    hosts.renamed(model, kwargs)
    made = attachment(model)
    if made is not None:
        check_identity(made.identity(model), cache.identity)
    if eyes is not None:
        pictures.note(model, eyes, cache, args, kwargs)


def _begin(eyes: Eyes | None, decoder: Any, cache: BoundedCache, args: Any, kwargs: dict[str, Any]) -> None:
    hosts.renamed(decoder, kwargs)
    now = decoder.config._attn_implementation
    if cache.shared is not None and not str(now).startswith(NAME):
        raise UnsupportedFeatureError(
            f"the model's attention was set to {now!r} after it was attached, which knows no bounded cache; "
            "attach it again"
        )
    arriving = cache.sight.arriving
    mask = kwargs.get("attention_mask") if arriving is None else arriving.mask
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise UnsupportedFeatureError(
            "an attention mask other than (sequences, tokens) has no meaning once entries are evicted; drop "
            "it, or pad on the left and give the tokenizer's mask"
        )
    ids = next(v for v in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if v is not None)
    if cache.shared is not None:
        cache.shared.begin(ids.shape[0], ids.shape[1], mask)
        if eyes is None or eyes.counter is None:
            _place(decoder, cache.shared, args, kwargs)
    if eyes is not None:
        positions.place(eyes, cache, ids.shape[0], ids.shape[1], kwargs)


def _place(decoder: Any, shared: Bounded, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell the decoder where rows stand that do not stand where the cache does, if nobody has."""
    assert shared.reading is not None
    place = shared.reading.positions(shared.places)
    if place is None:
        return
    signature = inspect.signature(decoder.forward)
    if "position_ids" in signature.parameters:
        if signature.bind_partial(*args, **kwargs).arguments.get("position_ids") is None:
            kwargs["position_ids"] = place
    elif any(row.seen for row in shared.rows):
        raise UnsupportedFeatureError(
            f"{type(decoder).__name__} takes no position_ids, so that its rows must have begun together; use "
            "one cache for each sequence"
        )


def _observe(hidden: dict[int, int], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if (step := current()) is not None:
        # where this is compiled, one layer must not be told from another
        step.observe(module, x)
        return
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    hidden[layer] = x.shape[-1]
    cache = _bounded(args, kwargs)
    entry = cache.layers[layer] if cache is not None else None
    if isinstance(entry, BoundedKVCache):
        if running.get() is not cache:
            raise CacheError("a bounded cache was given to a part of a model; run the whole decoder")
        entry.observe(x.detach())


# ---------------------------------------------------------------- attention


def implementation(stock: str) -> str:
    """The name under which our functions are registered in front of a stock implementation."""
    if stock not in ("eager", "sdpa"):
        # ours replaces it where it matters; sliding-window layers are short
        stock = "sdpa"
    name = f"{NAME}{stock}"
    AttentionInterface.register(name, partial(_attention, stock))
    AttentionMaskInterface.register(name, partial(_mask, stock))
    return name


def _attention(
    stock: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if (step := current()) is not None and (own := step.owner_of(key)) is not None:
        return own.attend(query, options).transpose(1, 2).contiguous(), None
    owner = BoundedKVCache.owner_of(key)
    if owner is None:
        # where the model's file has it, which need not be a module that was imported by name
        default: Any = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
        function = ALL_ATTENTION_FUNCTIONS.get_interface(stock, default)
        out: tuple[torch.Tensor, torch.Tensor | None] = function(
            module, query, key, value, attention_mask, **options
        )
        return out
    cache = running.get()
    # what _mask has made for the pass's own tokens
    block = (
        None if attention_mask is None or attention_mask is not cache.sight.block else attention_mask[:, 0]
    )
    strange = (attention_mask is not None and block is None) or options.get("position_bias") is not None
    if strange or options.get("sliding_window") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} changes its mask or its logits in a way that cannot follow evicted "
            "entries; use another model"
        )
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    made = owner.attend(query, scale, options.get("s_aux"), options.get("softcap"), block)
    return made.transpose(1, 2).contiguous(), None


def _mask(stock: str, **how: Any) -> Any:
    """No mask for plain causal attention over a bounded cache, which knows its own padding.

    Where tokens of a picture see each other, a mask of the pass's own tokens, (R, 1, T, T).
    """
    if current() is not None:
        return None
    cache = running.get()
    if cache is not None and cache.shared is not None:
        if how.get("mask_function") is causal_mask_function:
            return None
        if pictures.both_ways(how.get("mask_function")):
            # all that is kept is visible
            own = {"kv_length": how["q_length"], "kv_offset": how["q_offset"], "allow_is_causal_skip": False}
            cache.sight.block = sdpa_mask(**how | own)
            return cache.sight.block
    return ALL_MASK_ATTENTION_FUNCTIONS[stock](**how)
