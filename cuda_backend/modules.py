"""Which parts of a stock transformers model are its attention, and which of its layers compete."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention modules by layer: the innermost ones with a ``layer_idx`` whose forward takes a cache."""
    found = {name: module for name, module in model.named_modules() if _takes_cache(module)}
    inner = {n: m for n, m in found.items() if not any(other.startswith(f"{n}.") for other in found)}
    return {int(module.layer_idx): module for module in inner.values()}


def competing_layers(model: PreTrainedModel) -> list[int]:
    """Layers that cache every token, in order; sliding windows and state spaces are left alone."""
    layers = DynamicCache(config=model.config).layers
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def _takes_cache(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    # the first since transformers 5.24, the others before and in some models
    return not {"cache", "past_key_values", "layer_past"}.isdisjoint(
        inspect.signature(module.forward).parameters
    )
