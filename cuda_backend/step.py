"""One decoding step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .cache import BoundedCache, cache_argument


def decoder_step(model: PreTrainedModel, cache: BoundedCache) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from tokens (R, 1) to logits (R, V) of the next ones."""
    given = cache_argument(model, cache)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, **given).logits[:, -1]
        return logits

    return step
