"""What batches and serving ask of MLX: mlx-lm's own batch generator, and what goes into it."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator as Stock

from ..errors import UnsupportedFeatureError
from .api import stop_tokens
from .attaching import make_cache
from .generation import TokenIds, vocabulary
from .hooks import checked_cache, row_cache, rows_agree
from .sampling import alike, alone, of_first, processors_of
from .seeing import Seen, Speaker, check_no_pictures, prepared
from .vision import family, is_vision, speaking

__all__ = [
    "BatchGenerator",
    "Seen",
    "TokenIds",
    "alike",
    "alone",
    "check_no_pictures",
    "checked_cache",
    "make_cache",
    "of_first",
    "prepared",
    "processors_of",
    "row_cache",
    "stop_tokens",
    "vocabulary",
]


class _Seeing(Stock):
    """Of a vision-language model, whose bounded caches count the positions of its rows."""

    def insert(self, *prompts: Any, **given: Any) -> Any:
        if any(getattr(cache, "shared", None) is None for cache in given.get("caches") or [None]):
            raise UnsupportedFeatureError(
                "a cache of policy 'full' cannot stand in a batch of a vision-language model; choose another "
                "policy or a larger budget"
            )
        return super().insert(*prompts, **given)


def BatchGenerator(model: nn.Module, **options: Any) -> Any:
    """mlx-lm's batch generator.

    Raises:
        UnsupportedFeatureError: of a vision-language model whose rows would be read other than alone.
    """
    if not is_vision(model):
        return Stock(model, **options)
    if not rows_agree(model):
        raise UnsupportedFeatureError(
            f"batches do not work with this {family(model)} model, whose rows do not decode as each does "
            "alone; generate one text after another"
        )
    return _Seeing(Speaker(speaking(model)), **options)
