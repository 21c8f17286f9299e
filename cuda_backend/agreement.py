"""A hooked model's logits against its own, before it is accepted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mlx_kvret.core.probing import COMPARED, ordinary_ids, probe_length
from mlx_kvret.core.types import Array

from .cache import cache_argument


class RoundedDifferently(DynamicLayer):
    """A stock layer whose keys and values are off by up to one unit in the last place, a token as a whole."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        random = torch.Generator().manual_seed(self.get_seq_length())
        error = 2 * torch.rand(*key_states.shape[:3], 1, generator=random) - 1
        off = 1 + torch.finfo(key_states.dtype).eps * error.to(key_states.device)
        rounded = [(states * off).to(states.dtype) for states in (key_states, value_states)]
        return super().update(*rounded, *args, **kwargs)


def rounded_cache(model: PreTrainedModel, places: Collection[int]) -> DynamicCache:
    """A stock cache whose layers at ``places`` round differently."""
    cache = DynamicCache(config=model.config)
    for place in places:
        cache.layers[place].__class__ = RoundedDifferently
    return cache


def tokens_of(model: PreTrainedModel) -> torch.Tensor:
    """Ordinary tokens (1, T) to probe a model with."""
    weights = sum(weight.numel() for weight in model.parameters())
    layers = DynamicCache(config=model.config).layers
    windows = [w for layer in layers if (w := getattr(layer, "sliding_window", None))]
    vocabulary = model.config.get_text_config().vocab_size
    ids = ordinary_ids(vocabulary, probe_length(weights, windows))
    return torch.from_numpy(ids)[None].to(model.device)


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: torch.Tensor, sizes: list[int], cache: Any) -> Array:
    """The last logits (COMPARED, vocabulary) after reading chunks of these sizes, float32."""
    given = cache_argument(model, cache)
    parts = [model(part, **given, logits_to_keep=COMPARED).logits[0] for part in ids.split(sizes, 1)]
    return as_array(torch.cat([part[-COMPARED:] for part in parts])[-COMPARED:])


def as_array(logits: torch.Tensor) -> Array:
    """Logits on the host, float32."""
    found: Array = logits.float().cpu().numpy()
    return found
