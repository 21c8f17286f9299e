"""The cache as transformers knows it: one layer object per layer, here with layers that share one budget."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from mlx_kvret.core.absent import Absent
from mlx_kvret.core.passes import Passes
from mlx_kvret.core.state import State
from mlx_kvret.core.types import Ints
from mlx_kvret.errors import ModelMismatchError, UnsupportedFeatureError

from .bounded import Bounded
from .kernels.dispatch import append, attend
from .modes import ordinary
from .view import LayerView

# the cache of the forward pass that is under way
running: ContextVar[BoundedCache | None] = ContextVar("kvret_cache", default=None)


class BoundedKVCache(CacheLayerMixin):
    """One competing layer: transformers' cache contract on a shared :class:`Bounded`.

    Its length is the number of tokens seen, not cached: RoPE positions are true positions.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, shared: Bounded, layer: int) -> None:
        super().__init__()
        self.shared, self.layer = shared, layer
        self.fetched: tuple[torch.Tensor, torch.Tensor] | None = None
        self.attended = 0
        self.record_past = False

    @classmethod
    def owner_of(cls, keys: torch.Tensor) -> BoundedKVCache | None:
        """The cache whose :meth:`update` returned exactly this tensor in the pass under way.

        Attention functions are not told which cache keys come from.
        """
        cache = running.get()
        owner: BoundedKVCache | None = None if cache is None else cache.fetchers.get(id(keys))
        return owner if owner is not None and owner.fetched and owner.fetched[0] is keys else None

    @ordinary
    def observe(self, x: torch.Tensor) -> None:
        """Take in the layer's attention input (R, T, hidden)."""
        self.fetched = None
        if (static := self.shared.static) is not None:
            if static.inputs:
                static.inputs[self.layer].index_copy_(1, static.waiting, x)
            return
        self.shared.recents[self.layer].observe(x)

    @ordinary
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the step's keys and values (R, H, T, D).

        Returns the rectangle (R, H, r, D), from which :mod:`cuda_backend.attention` goes on to the pool.
        """
        recent, static = self.shared.recents[self.layer], self.shared.static
        if static is None:
            recent.append(key_states.detach(), value_states.detach())
            self.shared.seen[self.layer] += key_states.shape[2]
            self.fetched = recent.keys, recent.values
        else:
            self.fetched = recent.storage()
            for new, wide in zip((key_states, value_states), self.fetched, strict=True):
                append(new, wide, static.length)
        if (cache := running.get()) is not None:
            cache.fetchers[id(self.fetched[0])] = self
        return self.fetched

    def attend(
        self,
        queries: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Attention of the step's queries (R, Hq, T, D) over all this layer holds: (R, Hq, T, Dv)."""
        self.attended += queries.shape[2]
        static = self.shared.static
        return attend(queries, self.view(), scale, sinks, softcap, None if static is None else static.after)

    def view(self) -> LayerView:
        """What the layer attends to, after :meth:`update`."""
        assert self.fetched is not None
        shared, (keys, values) = self.shared, self.fetched
        start = shared.seen[self.layer] - keys.shape[2]
        # a step of fixed shapes comes only once the padding is over
        padded = shared.static is None and bool((shared.schedule.padding > start).any())
        hidden = (shared.padding - start).clamp(min=0) if padded else None
        return LayerView(shared.pool, self.layer, shared.shape.layers, keys, values, hidden)

    # -------------------------------------------------- what transformers asks, and what cannot work

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        return self.shared.seen[self.layer]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Tokens of the next passes may be taken back, each before another one comes."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether a rollback leaves no trace: of the last pass, for who announced it; else of all tokens."""
        waiting = self.shared.recents[self.layer].length
        undecided = self.get_seq_length() == waiting and self.shared.schedule.next(waiting, waiting) is None
        return self.record_past or undecided

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens.

        Raises:
            UnsupportedFeatureError: some of them have been through a compaction, which nothing brings back.
        """
        self.shared.passes.repair()
        if count := self.to_crop(tokens_to_remove):
            self.shared.take_back(count, [self.layer])

    def to_crop(self, tokens_to_remove: int) -> int:
        """How many tokens :meth:`crop` would take back. Raises as that does."""
        # a number that transformers has counted on the device
        removed, length = int(tokens_to_remove), self.shared.recents[self.layer].length
        if removed > 0 or -removed > length:
            raise UnsupportedFeatureError(
                f"cannot crop by {removed}: give minus the number of tokens to take back, at most {length}, "
                "for older ones have been through a compaction; or make a new cache"
            )
        return -removed

    reorder_cache, offload, prefetch, reset = (Absent() for _ in range(4))


def _unbounded(cache: BoundedCache) -> bool:
    return cache.shared is None


class BoundedCache(Cache):
    """A cache for ``past_key_values``: one layer object per layer, and figures over all of them.

    Competing layers are :class:`BoundedKVCache`; sliding-window and state-space layers keep their own kind.
    ``shared`` is None if nothing is ever evicted (policy ``"full"``); else what cannot be done is absent.
    """

    reorder_cache, offload, prefetch, reset, batch_repeat_interleave, batch_select_indices = (
        Absent(unless=_unbounded) for _ in range(6)
    )

    def __init__(self, layers: list[Any], shared: Bounded | None, competing: list[Any]) -> None:
        super().__init__(layers=layers)
        self.shared, self.competing = shared, competing
        self.passes = Passes() if shared is None else shared.passes
        # of the pass under way: by id of the keys, whose they are
        self.fetchers: dict[int, BoundedKVCache] = {}
        self._identity, self._trial = "", False

    @property
    def identity(self) -> str:
        """The model and gates it belongs to."""
        return self._identity if self.shared is None else self.shared.identity

    @identity.setter
    def identity(self, identity: str) -> None:
        if self.shared is not None:
            self.shared.identity = identity
        self._identity = identity

    def run(self, forward: Callable[[], Any]) -> Any:
        """What ``forward()`` returns, a forward pass into this cache, which is undone if it is broken off."""
        self.settle()
        passes, stock = self.passes, self._stock()
        held = [State.of(stock)] if self.shared is None else [State.of(stock), self.shared.before()]
        try:
            passes.begin(State.all(held))
            out = forward()
            self._release()
        except BaseException:
            passes.running = False
            if self.in_place:
                passes.lose(
                    "a forward pass was broken off in a model of state-space layers, which change in place"
                )
            passes.undo()
            self._release()
            raise
        if self._trial:
            passes.undo()
        passes.commit()
        return out

    @property
    def in_place(self) -> bool:
        """Whether layers change in place, so that a pass cannot be undone."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    def _release(self) -> None:
        """Forget what was fetched: a slice that is still referred to would keep the memory of a rectangle."""
        self.fetchers = {}
        for layer in self.layers:
            if isinstance(layer, BoundedKVCache):
                layer.fetched = None

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values to a layer.

        Raises:
            ModelMismatchError: the model is not attached.
        """
        self._check_pass()
        return super().update(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Renew a state-space layer's convolution. Raises as :meth:`update`."""
        self._check_pass()
        return super().update_conv_state(*args, **kwargs)

    def _check_pass(self) -> None:
        if self.shared is not None and running.get() is not self:
            raise ModelMismatchError(
                "a bounded cache was given to a model that is not attached, or to a part of one; attach the "
                "model it was made for with mlx_kvret.attach(model, gates) and call the whole model, or give "
                "this one a cache of its own"
            )

    def settle(self) -> None:
        """Carry out what is due, or was broken off."""
        if self.shared is not None:
            self.shared.settle()
        self.passes.check()

    def take_back(self, count: int) -> bool:
        """Forget the newest ``count`` tokens, of a full window for which that is too late they are not."""
        self.passes.repair()
        try:
            self.crop(-count)
        except (UnsupportedFeatureError, ValueError, RuntimeError, NotImplementedError):
            return False
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens in all layers, or in none."""
        bounded = [layer for layer in self.layers if isinstance(layer, BoundedKVCache)]
        for layer in bounded:
            layer.to_crop(tokens_to_remove)
        # others refuse before they change anything
        for layer in [*self._stock(), *bounded]:
            layer.crop(tokens_to_remove)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Forward passes inside are undone at their end."""
        self._trial = True
        try:
            yield
        finally:
            self._trial = False

    @property
    def fixed(self) -> bool:
        """Whether a step of fixed shapes runs, which keeps its own accounts."""
        return self.shared is not None and self.shared.static is not None

    def _stock(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, BoundedKVCache)]

    @property
    def seen(self) -> int:
        """Tokens seen so far, padding included."""
        self.passes.repair()
        return int(self.competing[0].get_seq_length())

    @property
    def entries(self) -> int:
        """Cached entries of the competing layers: one token in one KV head of one layer each."""
        if self.shared is not None:
            return self.shared.entries
        return sum(
            c.keys.shape[0] * c.keys.shape[1] * c.keys.shape[2] for c in self.competing if c.keys is not None
        )

    @property
    def nbytes(self) -> int:
        """Bytes of everything cached: keys, values, retention, positions, tables, waiting gate inputs."""
        tensors = [t for layer in self.layers for t in _tensors(vars(layer))]
        return sum(t.nbytes for t in tensors) + (self.shared.nbytes if self.shared is not None else 0)

    def kept_positions(self, row: int = 0) -> list[list[Ints]]:
        """For each competing layer, for each KV head, the sorted positions of a sequence's entries."""
        if self.shared is not None:
            return self.shared.kept_positions(row)
        heads = [0 if c.keys is None else c.keys.shape[1] for c in self.competing]
        return [[np.arange(c.get_seq_length())] * n for c, n in zip(self.competing, heads, strict=True)]

    @ordinary
    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedCache:
        self.settle()
        layers = copy.deepcopy(self.layers, memo)
        # memo maps each old layer to its copy
        twin = BoundedCache(layers, copy.deepcopy(self.shared, memo), copy.deepcopy(self.competing, memo))
        twin.identity = self.identity
        return twin


def cache_name(model: nn.Module) -> str:
    """How the model's forward calls its cache: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache under the name the model's forward knows."""
    return {cache_name(model): cache}


def _tensors(values: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors held by a stock layer, also those in its dictionaries of states."""
    nested = [v for value in values.values() if isinstance(value, dict) for v in value.values()]
    return [v for v in [*values.values(), *nested] if isinstance(v, torch.Tensor)]
