"""The prompt cache of a training pass: nothing is cached, attention calls go to the decayed attention.

An attached model's hooks (:mod:`..hooks`) show each entry its attention's input and hand it the
attention call. A model's mask is kept as what it would show, and built for one block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as mlx_cache
import numpy as np

from ...errors import UnsupportedModelError
from ..gates import RetentionGates
from ..kinds import is_kind
from ..probe import Place
from .attention import PackedMask, decay_attention


@dataclass(frozen=True)
class Causal:
    """The mask a model asked for: causal, within a sliding window if it has one."""

    window: int | None


class Entry:
    """Stands in for one layer's KV cache in one pass over packed documents.

    ``gates`` and ``layer`` (the gate's) are those of a competing layer of the student, else None; then
    ``log_beta`` (B, T, H) is what the gate said, 0 for the first ``sinks`` tokens of each document.
    ``offset`` is the position of the first token.
    """

    def __init__(
        self,
        mask: PackedMask,
        gates: RetentionGates | None,
        layer: int | None,
        offset: int = 0,
        sinks: int = 0,
    ):
        self.mask, self.gates, self.layer, self.offset, self.sinks = mask, gates, layer, offset, sinks
        self.log_beta: mx.array | None = None

    def gate_modules(self) -> list[nn.Module]:
        """The modules whose weights this entry computes with."""
        if self.gates is None or self.layer is None:
            return []
        shared = [self.gates.shared] if self.gates.config.shared_projection else []
        return [self.gates.layers[self.layer], *shared]

    def observe(self, x: mx.array) -> None:
        if self.gates is not None and self.layer is not None:
            log_beta = self.gates.log_beta(self.layer, x)
            if self.sinks:
                position = np.arange(x.shape[1]) - self.mask.starts
                log_beta = mx.where(mx.array(position < self.sinks)[..., None], 0.0, log_beta)
            self.log_beta = log_beta

    def make_mask(self, tokens: int, window_size: int | None = None, return_array: bool = False) -> Causal:
        return Causal(window_size or self.mask.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """mlx-lm's ``scaled_dot_product_attention``: (B, H·G, T, D) to (B, H·G, T, Dv)."""
        if mask is not None and not isinstance(mask, Causal):
            raise UnsupportedModelError(
                "this model builds its attention mask by hand, which training does not follow; use another"
            )
        packed = replace(self.mask, window=mask.window if mask else self.mask.window)
        return decay_attention(queries, keys, values, self.log_beta, packed, scale, sinks)


def entries_for(
    stock: list[Any],
    places: tuple[Place, ...],
    mask: PackedMask,
    gates: RetentionGates | None,
    offset: int = 0,
    sinks: int = 0,
) -> list[Any]:
    """A model's stock cache with an entry in place of every KV cache; recurrent states begin anew.

    Raises:
        UnsupportedModelError: there is a cache of another kind.
    """

    def stand_in(cache: Any, place: Place) -> Any:
        if is_kind(cache, "CacheList"):
            index = place[0]
            return mlx_cache.CacheList(*(stand_in(c, (index, i)) for i, c in enumerate(cache.caches)))
        if is_kind(cache, "ArraysCache") or isinstance(cache, mlx_cache.ArraysCache):
            return None
        if is_kind(cache, "RotatingKVCache"):
            return Entry(replace(mask, window=cache.max_size), gates, None, offset)
        if is_kind(cache, "KVCache"):
            layer = places.index(place) if place in places else None
            return Entry(mask, gates, layer, offset, sinks)
        raise UnsupportedModelError(
            f"a layer has a {type(cache).__name__}, which training on MLX does not follow; use another model"
        )

    return [stand_in(cache, (index, None)) for index, cache in enumerate(stock)]


def entries_in(cache: Any) -> Iterator[Entry]:
    """The entries in a model's or a layer's cache argument."""
    if isinstance(cache, Entry):
        yield cache
    for inner in cache if isinstance(cache, list) else getattr(cache, "caches", ()):
        yield from entries_in(inner)
