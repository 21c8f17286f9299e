"""What :mod:`mlx_kvret.batching` asks of torch: the backend's batch generator, and what goes into it."""

from transformers import PreTrainedModel

from .attaching import make_cache
from .batch import BatchGenerator
from .cache import BoundedCache
from .generation import TokenIds, stop_tokens, vocabulary
from .hooks import check_cache
from .sampling import alike, alone, of_first, processors_of
from .seeing import Seen, check_no_pictures, prepared

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


def checked_cache(model: PreTrainedModel, cache: BoundedCache) -> BoundedCache:
    """A cache that the model can go on with. Raises as :func:`.hooks.check_cache`."""
    check_cache(model, cache)
    return cache


def row_cache(model: PreTrainedModel, cache: BoundedCache) -> BoundedCache:
    """The cache of a row that has left a batch."""
    return checked_cache(model, cache)
