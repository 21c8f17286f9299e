"""A hooked model's logits against its own, before it is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as mlx_cache
import numpy as np
from mlx.utils import tree_flatten

from ..core.config import EvictionConfig
from ..core.probing import COMPARED, agrees, chunkings, distance, ordinary_ids, probe_length
from ..core.ranks import Ranks
from ..core.types import Array
from ..errors import KVRetError, UnsupportedFeatureError, UnsupportedModelError
from .vision import forget, logits_of

if TYPE_CHECKING:
    from .probe import Layout


class RoundedDifferently(mlx_cache.KVCache):
    """A stock cache whose keys and values are off by up to one unit in the last place, a token as a whole."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        error = mx.random.uniform(-1, 1, (*keys.shape[:3], 1), key=mx.random.key(self.offset))
        off = 1 + mx.finfo(keys.dtype).eps * error
        return super().update_and_fetch((keys * off).astype(keys.dtype), (values * off).astype(values.dtype))


def check_agreement(
    model: nn.Module,
    layout: Layout,
    stock: Callable[[], list[Any]],
    bounded: Callable[[EvictionConfig], list[Any]],
    name: str,
) -> None:
    """Run a few tokens through a hooked model with its own caches and with a bounded one that evicts nothing.

    ``stock`` makes new caches of the model's own, ``bounded`` ours. Most entries go through the pool.

    Raises:
        UnsupportedModelError: the logits differ by more than rounding.
    """
    ids = tokens_of(model, stock(), None if layout.share is None else layout.share.ranks)
    plain, cut = chunkings(tokens := ids.shape[1])
    expected, eps = _logits(model, ids, plain, stock())
    config = EvictionConfig.create(budget=tokens, buffer=4, policy="recent")
    try:
        found, _ = _logits(model, ids, cut, bounded(config))
    except KVRetError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: their attention uses the cache in a way of its own "
            f"({reason}); use another model"
        ) from error

    def rounding() -> float:
        return _rounding(model, layout, stock, ids)

    if not agrees(difference := distance(found, expected), eps, rounding):
        raise UnsupportedModelError(
            f"{name} models give other logits from a bounded cache (by {difference:.1%}); use another model"
        )


def check_rows(
    model: nn.Module,
    layout: Layout,
    stock: Callable[[], list[Any]],
    bounded: Callable[[EvictionConfig], Any],
    name: str,
) -> bool:
    """Whether two sequences of different lengths give the logits in a batch that each gives alone.

    Arguments as of :func:`check_agreement`.
    """
    ids = tokens_of(model, stock())
    config = EvictionConfig.create(budget=ids.shape[1], buffer=4, policy="recent")
    lengths = ids.shape[1] - 1, 3
    caches = [bounded(config) for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        _logits(model, ids, [length], cache)
    try:
        batch = caches[0].copy()
        batch.extend(caches[1].copy())
        alone = [logits_of(model(ids[:, -1:], cache=cache))[0, -1] for cache in caches]
        together = logits_of(model(mx.repeat(ids[:, -1:], 2, axis=0), cache=batch))[:, -1]
        found, expected = as_array(together), as_array(mx.stack(alone))
    except (UnsupportedFeatureError, TypeError, ValueError, AttributeError, IndexError):
        # what a model's own code makes of positions of several rows
        return False
    eps = float(mx.finfo(together.dtype).eps)
    return agrees(distance(found, expected), eps, lambda: _rounding(model, layout, stock, ids))


def _rounding(model: nn.Module, layout: Layout, stock: Callable[[], list[Any]], ids: mx.array) -> float:
    """How far a model's own logits are from themselves when they are rounded differently."""
    plain = [ids.shape[1]]
    expected, _ = _logits(model, ids, plain, stock())
    return distance(_logits(model, ids, plain, layout.replaced(stock(), RoundedDifferently))[0], expected)


def tokens_of(model: nn.Module, stock: list[Any], ranks: Ranks | None = None) -> mx.array:
    """Ordinary tokens (1, T) to probe a model with, on all ``ranks`` the same; ``stock`` are new caches."""
    windows = [c.max_size for entry in stock for c in getattr(entry, "caches", (entry,)) if _has_window(c)]
    weights: Any = tree_flatten(model.parameters())
    # eight weights of four bits are one number
    count = sum(array.size * (8 if array.dtype == mx.uint32 else 1) for _, array in weights)
    # built, not computed
    vocabulary = logits_of(model(mx.zeros((1, 1), mx.int32))).shape[-1]
    length = probe_length(count, windows)
    if ranks is not None:
        length = int(ranks.first(np.array([length]))[0])
    return mx.array(ordinary_ids(vocabulary, length))[None]


def as_array(logits: mx.array) -> Array:
    """Logits on the host, float32."""
    return np.array(logits.astype(mx.float32))


def _has_window(cache: Any) -> bool:
    return isinstance(getattr(cache, "max_size", None), int)


def _logits(model: nn.Module, ids: mx.array, sizes: list[int], cache: list[Any]) -> tuple[Array, float]:
    """The last logits (COMPARED, vocabulary) after chunks of these sizes, and their type's rounding."""
    parts, start = [], 0
    forget(model)
    for size in sizes:
        parts.append(logits_of(model(ids[:, start : start + size], cache=cache))[0, -COMPARED:])
        start += size
    last = mx.concatenate(parts)[-COMPARED:]
    return as_array(last), float(mx.finfo(last.dtype).eps)
