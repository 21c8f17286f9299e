"""What :mod:`mlx_kvret.batching` asks of MLX: mlx-lm's own batch generator, and what goes into it."""

from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator as Stock

from ..errors import UnsupportedFeatureError
from .api import stop_tokens
from .attaching import make_cache
from .generation import TokenIds, vocabulary
from .hooks import checked_cache, row_cache
from .sampling import alike, alone, processors_of
from .vision import is_vision

__all__ = [
    "BatchGenerator",
    "TokenIds",
    "alike",
    "alone",
    "checked_cache",
    "make_cache",
    "processors_of",
    "row_cache",
    "stop_tokens",
    "vocabulary",
]


def BatchGenerator(model: nn.Module, **options: Any) -> Any:
    """mlx-lm's batch generator.

    Raises:
        UnsupportedFeatureError: of a vision-language model, whose positions are those of one sequence.
    """
    if is_vision(model):
        raise UnsupportedFeatureError(
            "batches do not work with a vision-language model; generate one text after another"
        )
    return Stock(model, **options)
