"""What a model caches, found out by running a few tokens through its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mlx_kvret.core.advice import reach_of
from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.fitting import fit_gates
from mlx_kvret.core.probing import agrees, chunkings, distance
from mlx_kvret.core.shares import Share
from mlx_kvret.core.snapshot import WindowShape
from mlx_kvret.errors import KVRetError, UnsupportedModelError

from .agreement import last_logits, rounded_cache, tokens_of
from .bounded import Bounded
from .cache import BoundedCache, BoundedKVCache, cache_argument
from .gates import CODES, RetentionGates
from .memory import out_of_memory
from .ranks import split_of


@dataclass(frozen=True)
class Layout:
    """The competing layers of a model: their common shape, their places, and the number of all layers.

    ``windows`` tells what layers with a sliding window cache, by place, ``dtype`` the float type of
    keys and values as in safetensors.
    """

    shape: CacheShape
    places: tuple[int, ...]
    layers: int
    device: torch.device
    dtype: str
    windows: dict[int, WindowShape] = field(default_factory=dict)
    # where several processes hold the model together
    share: Share | None = None
    # tokens that the model was made for, where it says so
    reach: int | None = None

    @property
    def whole(self) -> CacheShape:
        """The shape over all ranks."""
        return self.shape if self.share is None else self.share.whole

    def check_gates(self, gates: RetentionGates) -> tuple[int, ...]:
        """As :func:`mlx_kvret.core.fitting.fit_gates`."""
        return fit_gates(gates.config, self.whole, self.places, self.layers)

    def bounded_cache(
        self, entries: list[Any], config: EvictionConfig, gates: RetentionGates | None, owner: dict[str, str]
    ) -> BoundedCache:
        """Stock layers with the competing ones replaced (policy ``"full"`` replaces none)."""
        if config.policy == "full":
            made = BoundedCache(entries, None, [entries[place] for place in self.places])
            made.stock_share = self.share
            return made
        shared = self.shared(config, gates, owner)
        competing = [BoundedKVCache(shared, layer) for layer in range(self.shape.layers)]
        for place, entry in zip(self.places, competing, strict=True):
            entries[place] = entry
        return BoundedCache(entries, shared, competing)

    def shared(self, config: EvictionConfig, gates: RetentionGates | None, owner: dict[str, str]) -> Bounded:
        """An empty pool for this model."""
        scoring = gates if config.policy == "learned" else None
        layers = None if scoring is None else self.check_gates(scoring)
        made = Bounded.single(self.shape, config, owner, self.device, scoring, layers, self.share)
        made.arena.reach = self.reach
        return made


def stock_layers(model: PreTrainedModel) -> list[Any]:
    """New cache layers of the kinds the model uses without us."""
    return list(DynamicCache(config=model.config).layers)


@torch.no_grad()
def probe(model: PreTrainedModel, hooked: Callable[[], None], hidden: dict[int, int]) -> Layout:
    """Run a few tokens through the model as it is, then, after ``hooked()``, through its hooks.

    ``hidden`` is filled by the hooks: the width of the attention input by layer.

    Raises:
        UnsupportedModelError: the hooked model does not give the same logits from a bounded cache.
    """
    name, layout = model.config.model_type, layout_of(model, hidden)
    layout = replace(layout, share=split_of(model, layout.shape), reach=reach_of(model.config.to_dict()))
    ids = tokens_of(model)
    plain, cut = chunkings(ids.shape[1])
    with refusals(name):
        expected = last_logits(model, ids, plain, DynamicCache(config=model.config))
        hooked()
        # nothing is evicted, but most entries go through the pool
        config = EvictionConfig.create(budget=ids.shape[1], buffer=4, policy="recent")
        cache = layout.bounded_cache(stock_layers(model), config, None, {})
        found = last_logits(model, ids, cut, cache)
    if any(entry.attended != ids.shape[1] for entry in cache.competing):
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: their attention changes cached keys, or bypasses "
            "transformers' attention functions; use another model"
        )

    def rounding() -> float:
        return distance(last_logits(model, ids, plain, rounded_cache(model, layout.places)), expected)

    if not agrees(difference := distance(found, expected), torch.finfo(model.dtype).eps, rounding):
        raise UnsupportedModelError(
            f"{name} models give other logits from a bounded cache (by {difference:.1%}); use another model"
        )
    return layout


@torch.no_grad()
def layout_of(model: PreTrainedModel, hidden: dict[int, int]) -> Layout:
    """The layout of a model whose attention modules fill ``hidden``, found out with two tokens.

    Raises:
        UnsupportedModelError: nothing to bound, or layers that differ.
    """
    name = model.config.model_type
    with refusals(name):
        cache = DynamicCache(config=model.config)
    places = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if not places:
        raise UnsupportedModelError(
            f"{name} models keep no layer's full KV cache, so there is nothing to bound; use them as they are"
        )
    with refusals(name):
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device), **cache_argument(model, cache))
    return _layout(cache, [place for place in places if cache.get_seq_length(place)], hidden, name)


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Errors of a model's own code, for a config that contradicts itself say, as one that names the model."""
    try:
        yield
    except KVRetError:
        raise
    except Exception as error:  # model files take a config at its word
        if out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"transformers does not run this {name} model: {error}; mend its config.json or use another model"
        ) from error


def _layout(cache: Any, places: list[int], hidden: dict[int, int], name: str) -> Layout:
    used = [cache.layers[place] for place in places]
    if not set(places) <= hidden.keys():
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: not all of their attention layers can be hooked; use another "
            "model"
        )
    shapes = {
        CacheShape(
            len(places), entry.keys.shape[1], entry.keys.shape[3], entry.values.shape[3],
            entry.keys.element_size(), hidden[place],
        )
        for place, entry in zip(places, used, strict=True)
    }  # fmt: skip
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"{name} models cannot be bounded: their layers cache entries of different shapes "
            f"({', '.join(map(str, sorted(shapes, key=str)))})"
        )
    devices = {entry.keys.device for entry in used}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model is spread over {', '.join(map(str, sorted(devices, key=str)))}, while one pool holds "
            "the entries of all layers; load it on one device"
        )
    windows = {
        index: WindowShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for index, layer in enumerate(cache.layers)
        if type(layer) is DynamicSlidingWindowLayer and layer.keys is not None and layer.values is not None
    }
    dtype = CODES[used[0].keys.dtype]
    return Layout(shapes.pop(), tuple(places), len(cache.layers), devices.pop(), dtype, windows)
