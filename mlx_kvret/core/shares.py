"""Which heads of a model are this process's, where several hold it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedFeatureError, UnsupportedModelError
from .budget import CacheShape
from .config import EvictionConfig
from .eviction import heads_per_group
from .ranks import Ranks
from .types import Array, Ints, Mask


@dataclass(frozen=True)
class Share:
    """A rank's ``shape.layers`` layers from ``layer`` on, and their ``shape.kv_heads`` heads from ``head``.

    ``whole`` is the shape over all ranks; layers are counted among those that compete. Where every rank holds
    all of it (latent attention) the first one decides for all.
    """

    ranks: Ranks
    shape: CacheShape
    whole: CacheShape
    layer: int = 0
    head: int = 0

    @property
    def copies(self) -> bool:
        """Whether every rank holds everything."""
        return self.shape.heads == self.whole.heads

    @property
    def heads(self) -> Ints:
        """Of each of this rank's flat heads the flat head of the whole, (heads,) int32."""
        layers = np.arange(self.layer, self.layer + self.shape.layers, dtype=np.int32)
        own = np.arange(self.head, self.head + self.shape.kv_heads, dtype=np.int32)
        return (layers[:, None] * self.whole.kv_heads + own).reshape(-1)

    def of_whole(self, size: int) -> int:
        """What all heads take, if this rank's take ``size``."""
        return size * self.whole.heads // self.shape.heads

    def of_all(self, size: int, config: EvictionConfig) -> int:
        """What entries of the whole may take, if those of each rank may take ``size``; an exchange.

        Where heads of several ranks compete, one may hold half as much again as its mean.
        """
        least = min(int(found[0]) for found in self.ranks.gather(np.array([self.of_whole(size)], np.int64)))
        return least * 2 // 3 if self.spread(config) else least

    def first_head(self, layer: int) -> int:
        """Flat head of the whole that a layer of this rank begins with here."""
        return (self.layer + layer) * self.whole.kv_heads + self.head

    def spread(self, config: EvictionConfig) -> bool:
        """Whether heads of one group stand on several ranks, so that selecting needs them all."""
        if config.scope == "layer":
            return self.shape.kv_heads < self.whole.kv_heads
        return config.scope in ("global", "modality") and not self.copies

    def groups(self, config: EvictionConfig) -> Ints:
        """Of each of this rank's groups the group of the whole."""
        size = heads_per_group(config, self.shape.layers, self.shape.kv_heads)
        return self.heads[::size] // heads_per_group(config, self.whole.layers, self.whole.kv_heads)

    def totals(self, counts: Ints, config: EvictionConfig) -> Ints:
        """Entries of each group of the whole, by those of each of this rank's groups; an exchange."""
        size = heads_per_group(config, self.whole.layers, self.whole.kv_heads)
        all_of_it = np.zeros(self.whole.heads // size, np.int32)
        if not self.copies or self.ranks.rank == 0:
            all_of_it[self.groups(config)] = counts
        return self.ranks.sum(all_of_it).astype(np.int64)

    def joined(self, counts: Ints, *arrays: Array) -> tuple[Ints, list[Array]]:
        """Entries of the whole in the order of its flat heads, by this rank's in the order of its own.

        ``counts`` (heads,) says how many entries each head has, ``arrays`` (N, ...) hold them; an exchange.
        """
        held = self.ranks.gather(np.stack([self.heads, counts.astype(np.int32)]))
        parts = [self.ranks.gather(array) for array in arrays]
        if self.copies:
            return held[0][1], [part[0] for part in parts]
        head, count = np.concatenate(held, axis=1)
        order = np.argsort(np.repeat(head, count), kind="stable")
        return count[np.argsort(head)], [np.concatenate(part)[order] for part in parts]

    def check_saved(self, others: bool) -> None:
        """Refuse to save or to open layers that are not bounded, of which each rank has its own.

        Raises:
            UnsupportedFeatureError: there are some.
        """
        if others:
            raise UnsupportedFeatureError(
                "a cache whose layers are not all bounded (sliding windows, say) is neither saved nor opened "
                "by several ranks; do it in one process"
            )

    def own(self, head: Ints) -> tuple[Mask, Ints]:
        """Which entries of the whole, by flat heads (N,), are this rank's, and their flat heads here."""
        local = np.full(self.whole.heads, -1, np.int32)
        local[self.heads] = np.arange(self.shape.heads, dtype=np.int32)
        found = local[head]
        return found >= 0, found[found >= 0]

    @classmethod
    def tensor(cls, ranks: Ranks, shape: CacheShape, latent: bool) -> Share:
        """Of heads split evenly over the ranks; ``latent`` models keep a copy of all of it on every rank."""
        if latent:
            return cls(ranks, shape, shape)
        whole = _with(shape, kv_heads=shape.kv_heads * ranks.size)
        return cls(ranks, shape, whole, head=ranks.rank * shape.kv_heads)

    @classmethod
    def pipeline(cls, ranks: Ranks, shape: CacheShape, places: Sequence[int]) -> tuple[Share, list[int]]:
        """Of layers split over the ranks, this one's at ``places`` of the model; an exchange.

        Returns the places of all ranks' too, in order.

        Raises:
            UnsupportedModelError: a layer stands on two ranks.
        """
        parts = ranks.gather(np.array(places, np.int32))
        found = sorted(int(place) for part in parts for place in part)
        if len(set(found)) < len(found):
            raise UnsupportedModelError("several ranks hold the same layer; split the model's layers evenly")
        whole = _with(shape, layers=len(found))
        return cls(ranks, shape, whole, layer=found.index(places[0])), found


def own_due(share: Share | None, due: Mask, config: EvictionConfig) -> Mask:
    """Which of this process's groups select, by those of the whole that do."""
    return due if share is None else due[share.groups(config)]


def by_layer(share: Share | None, heads: list[Ints], width: int) -> list[list[Ints]]:
    """Sorted positions of each flat head of this process as lists of ``width`` heads for each layer.

    Of several ranks (``share``) all must ask, and all are told of the whole; an exchange.
    """
    if share is not None:
        lengths = np.array([len(positions) for positions in heads], np.int32)
        counts, (all_of_it,) = share.joined(lengths, np.concatenate(heads))
        heads = np.split(all_of_it, np.cumsum(counts)[:-1])
    return [heads[i : i + width] for i in range(0, len(heads), width)]


def _with(shape: CacheShape, **changed: int) -> CacheShape:
    return CacheShape(**(vars(shape) | changed))


def check_seeing(split: bool) -> None:
    """Refuse a model that sees pictures, where several ranks hold it.

    Raises:
        UnsupportedModelError: it is ``split`` so.
    """
    if split:
        raise UnsupportedModelError(
            "a model that sees pictures is not bounded where several ranks hold it; load all of it in one "
            "process"
        )
