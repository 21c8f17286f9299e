"""What models of transformers call their cache."""

from __future__ import annotations

import inspect

from torch import nn
from transformers.cache_utils import Cache


def cache_name(model: nn.Module) -> str:
    """How the model's forward calls its cache: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache under the name the model's forward knows."""
    return {cache_name(model): cache}
