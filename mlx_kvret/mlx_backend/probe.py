"""What a model caches, found out by one forward pass that is built but never computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as mlx_cache
from mlx_lm.models.base import scaled_dot_product_attention

from ..core.bits import KVBits
from ..core.budget import CacheShape
from ..core.config import EvictionConfig
from ..core.fitting import fit_gates
from ..core.shares import Share
from ..errors import ConfigError, ModelMismatchError, UnsupportedFeatureError, UnsupportedModelError
from . import kernels
from .bounded import Bounded
from .cache import BoundedCache
from .entry import BoundedCacheList, BoundedKVCache
from .filling import fill
from .gates import CODES, RetentionGates
from .kinds import is_kind
from .others import Other
from .ranks import Split
from .saved import Loaded, snapshot_of

# where a competing entry stands in a prompt cache: its index, and its index in a CacheList there
Place = tuple[int, int | None]


@dataclass(frozen=True)
class Layout:
    """The competing layers of a model: their common shape, their places, and the number of all layers.

    ``latent`` models compute on the cached keys (MLA), so they get them padded instead of ragged. ``others``
    are the entries that do not compete, by place, ``dtype`` is the type of keys and values as in safetensors.
    """

    shape: CacheShape
    places: tuple[Place, ...]
    layers: int
    latent: bool
    dtype: str
    others: dict[Place, Other] = field(default_factory=dict)
    # where several processes hold the model together
    split: Split | None = None
    # tokens that the model was made for, where it says so
    reach: int | None = None

    @property
    def share(self) -> Share | None:
        """What this process holds of the whole; None if that is all."""
        return None if self.split is None else self.split.share

    @property
    def whole(self) -> CacheShape:
        """The shape over all ranks."""
        return self.shape if self.share is None else self.share.whole

    @property
    def all_places(self) -> tuple[int, ...]:
        """The competing layers of all ranks, counted in the whole model."""
        if self.split is not None and self.split.places:
            return self.split.places
        return tuple(index for index, _ in self.places)

    def check_gates(self, gates: RetentionGates) -> tuple[int, ...]:
        """Which gate belongs to which competing layer. Raises as :func:`fit_gates`."""
        split = self.split
        layers = split.layers if split is not None and split.places else self.layers
        found = fit_gates(gates.config, self.whole, self.all_places, layers)
        first = 0 if self.share is None else self.share.layer
        return found[first : first + self.shape.layers]

    def check_bits(self, kv_bits: KVBits) -> None:
        """Refuse few bits where no kernel reads them, or the model computes on the cached keys.

        Raises:
            UnsupportedFeatureError: says which.
        """
        if kv_bits is None:
            return
        if self.latent:
            raise UnsupportedFeatureError(
                f"kv_bits={kv_bits!r} does not work with latent attention (MLA), which computes on the "
                "cached keys; leave kv_bits away and lower the budget instead"
            )
        sizes = self.shape.key_dim, self.shape.value_dim
        if not set(sizes) <= set(kernels.HEAD_SIZES):
            raise UnsupportedFeatureError(
                f"kv_bits={kv_bits!r} does not work with heads of {sizes[0]} (keys) and {sizes[1]} (values) "
                "elements, for which there is no kernel; leave kv_bits away and lower the budget instead"
            )

    def bounded_cache(
        self, entries: list[Any], config: EvictionConfig, gates: RetentionGates | None, owner: dict[str, str]
    ) -> BoundedCache:
        """Stock entries with the competing ones replaced (policy ``"full"`` replaces none)."""
        if config.policy == "full":
            return self.full(entries)
        shared = self.shared(config, gates, owner)
        competing = self._place(entries, shared)
        return BoundedCache(entries, shared, competing)

    def shared(self, config: EvictionConfig, gates: RetentionGates | None, owner: dict[str, str]) -> Bounded:
        """An empty pool for this model. Raises as :meth:`check_bits`."""
        self.check_bits(config.kv_bits)
        scoring = gates if config.policy == "learned" else None
        layers = None if scoring is None else self.check_gates(scoring)
        made = Bounded.single(self.shape, config, owner, scoring, layers, self.share)
        made.arena.reach = self.reach
        return made

    def join(self, cache: list[Any], gates: RetentionGates | None, owner: dict[str, str]) -> Bounded | None:
        """Turn layers read from a prompt file into a working cache, in place; None if there are none.

        Raises:
            ModelMismatchError: the file was written for another model or with other gates.
            CheckpointError: it is damaged.
        """
        loaded = [_at(cache, place) for place in self.places]
        if not any(isinstance(entry, Loaded) for entry in loaded):
            return None
        if self.share is not None:
            raise UnsupportedFeatureError(
                "a prompt file of mlx-lm holds what one rank has; save and open caches with "
                "mlx_kvret.save_cache and load_cache, which do it for all"
            )
        first = next(entry for entry in loaded if isinstance(entry, Loaded))
        if first.shape != self.shape:
            raise ModelMismatchError(
                f"the saved cache belongs to another model: the model has {self.shape}, expected "
                f"{first.shape}; load that, or read the prompt again"
            )
        snapshot = snapshot_of(loaded, self.shape)
        snapshot.check(owner["model"], owner.get("gates", ""), snapshot.eviction)
        for place, other in self.others.items():
            other.check(_at(cache, place), snapshot.seen, place[0])
        shared = self.shared(snapshot.eviction, gates, owner)
        fill(shared, snapshot)
        self._place(cache, shared)
        return shared

    def extracted(self, entries: list[Any]) -> BoundedCache | None:
        """A prompt cache from entries that mlx-lm has kept in a list of its own; None if there are none."""
        competing = [_at(entries, place) for place in self.places]
        shared = {id(entry.shared): entry.shared for entry in competing if isinstance(entry, BoundedKVCache)}
        if len(shared) != 1 or len(entries) != self.layers:
            return None
        return BoundedCache(entries, next(iter(shared.values())), competing)

    def full(self, entries: list[Any]) -> BoundedCache:
        """A prompt cache that evicts nothing, from stock entries."""
        return BoundedCache(entries, None, [_at(entries, place) for place in self.places], self.share)

    def reopened(
        self, entries: list[Any], gates: RetentionGates | None, owner: dict[str, str]
    ) -> BoundedCache:
        """A prompt cache from layers that mlx-lm read from a file.

        Raises:
            ModelMismatchError: as :meth:`join`.
            ConfigError: they are no bounded cache.
        """
        if len(entries) != self.layers:
            raise ModelMismatchError(
                f"the saved cache has {len(entries)} layers, the model {self.layers}; load the model it was "
                "saved with, or read the prompt again"
            )
        shared = self.join(entries, gates, owner)
        if shared is None:
            raise ConfigError("cache is no bounded cache; make it with mlx_kvret.make_cache(model)")
        return BoundedCache(entries, shared, [_at(entries, place) for place in self.places])

    def replaced(self, entries: list[Any], make: Callable[[], Any]) -> list[Any]:
        """Stock entries with the competing ones replaced by others."""
        for index, inner in self.places:
            if inner is None:
                entries[index] = make()
            else:
                nested = entries[index].caches
                entries[index].caches = tuple(make() if i == inner else c for i, c in enumerate(nested))
        return entries

    def _place(self, entries: list[Any], shared: Bounded) -> list[BoundedKVCache]:
        competing = [BoundedKVCache(shared, layer, self.latent) for layer in range(self.shape.layers)]
        for (index, inner), entry in zip(self.places, competing, strict=True):
            if inner is None:
                entries[index] = entry
            else:
                nested = list(entries[index].caches)
                nested[inner] = entry
                entries[index] = BoundedCacheList(*nested)
        return competing


class _Probe(mlx_cache.KVCache):
    """A stock cache that notes what it is given and whether attention gets what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: int | None = None
        self.attended: str = "never"
        self.window: int | None = None

    def observe(self, x: mx.array) -> None:
        self.hidden = x.shape[-1]

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        self.window = kwargs.get("window_size") or self.window
        return super().make_mask(*args, **kwargs)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.fetched = super().update_and_fetch(keys, values)
        return self.fetched

    def attend(self, queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        same = keys is self.fetched[0] and values is self.fetched[1]
        self.attended = "as fetched" if same else "transformed"
        return scaled_dot_product_attention(queries, keys, values, None, *args, **kwargs)


def probe(model: nn.Module, stock: list[Any], name: str, latent: bool) -> Layout:
    """Build, without computing it, a forward pass of a hooked model on caches that take notes.

    ``latent`` models may compute on what they cached, as their attention tells.

    Raises:
        UnsupportedModelError: attention reads the cache in a way that cannot be bounded.
    """
    places = list(_stock_places(stock))
    if not places:
        raise UnsupportedModelError(
            f"{name} models keep no layer's full KV cache, so there is nothing to bound; use them as they are"
        )
    for index, inner in places:
        if inner is None:
            stock[index] = _Probe()
        else:
            stock[index].caches = tuple(
                _Probe() if i == inner else c for i, c in enumerate(stock[index].caches)
            )
    model(mx.zeros((1, 2), mx.int32), cache=stock)
    if windows := {p.window for place in places if (p := _at(stock, place)).window}:
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: they mask a window of {max(windows)} tokens over a cache of "
            "all tokens, and evicted entries cannot be masked by place; use one with sliding-window caches"
        )
    used = [(place, _at(stock, place)) for place in places if _at(stock, place).offset]
    ways = {p.attended if p.hidden else "unobserved" for _, p in used}
    if ways not in ({"as fetched"}, {"transformed"} if latent else ()):
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: their attention changes cached keys or values, or bypasses "
            "mlx-lm's attention function; use another model"
        )
    shapes = {_shape(p, len(used)) for _, p in used}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: their layers cache entries of different shapes "
            f"({', '.join(map(str, sorted(shapes, key=str)))})"
        )
    competing = tuple(place for place, _ in used)
    others = {place: Other.of(entry) for place, entry in _entries(stock) if place not in competing}
    dtype = CODES[used[0][1].fetched[0].dtype]
    return Layout(shapes.pop(), competing, len(stock), ways == {"transformed"}, dtype, others)


def _shape(probe: _Probe, layers: int) -> CacheShape:
    keys, values = probe.fetched
    return CacheShape(
        layers, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size, probe.hidden or 0
    )


def _stock_places(entries: list[Any]) -> Iterator[Place]:
    for index, entry in enumerate(entries):
        if is_kind(entry, "KVCache"):
            yield index, None
        elif is_kind(entry, "CacheList"):
            for inner, nested in enumerate(entry.caches):
                if is_kind(nested, "KVCache"):
                    yield index, inner


def _entries(entries: list[Any]) -> Iterator[tuple[Place, Any]]:
    for index, entry in enumerate(entries):
        for inner, nested in enumerate(getattr(entry, "caches", ())):
            yield (index, inner), nested
        if not hasattr(entry, "caches"):
            yield (index, None), entry


def _at(entries: list[Any], place: Place) -> Any:
    """The entry at a place, None where a loaded cache has nothing there."""
    index, inner = place
    if inner is None or index >= len(entries):
        return entries[index] if index < len(entries) else None
    nested = getattr(entries[index], "caches", ())
    return nested[inner] if inner < len(nested) else None
