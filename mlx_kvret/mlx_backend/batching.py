"""What :mod:`mlx_kvret.batching` asks of MLX: mlx-lm's own batch generator, and what goes into it."""

from mlx_lm.generate import BatchGenerator

from .api import stop_tokens
from .attaching import make_cache
from .generation import TokenIds, vocabulary
from .hooks import checked_cache, row_cache
from .sampling import alone, processors_of

__all__ = [
    "BatchGenerator",
    "TokenIds",
    "alone",
    "checked_cache",
    "make_cache",
    "processors_of",
    "row_cache",
    "stop_tokens",
    "vocabulary",
]
