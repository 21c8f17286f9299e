"""A competing layer's entry of a prompt cache, as mlx-lm knows it: all layers' entries share one budget."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import numpy as np

from ..core.absent import Absent
from ..errors import (
    CacheError,
    ModelMismatchError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from .batch import Batched
from .both_ways import attend as attend_both_ways
from .bounded import Bounded
from .reading import Reading
from .saved import Loaded, layer_state
from .view import LayerView

# what the layers share whose forward pass is under way
running: ContextVar[Bounded | None] = ContextVar("kvret_running", default=None)


class BoundedKVCache(Batched):
    """One competing layer's entry: mlx-lm's cache contract on a shared :class:`Bounded`.

    What it cannot do (quantisation; batches of what models compute on) is absent, for hosts ask with
    ``hasattr``. ``offset`` is the number of tokens seen, not cached: RoPE positions are true positions; in a
    batch it is that of each row, (rows,). ``padded`` is for models that compute on the fetched keys (latent
    attention): they get heads padded to equal length.
    """

    merge = Absent(unless=lambda cache: not (cache.padded or cache.shared.batch))
    extract, filter, extend, prepare, finalize = (
        Absent(unless=lambda cache: cache.shared.batch) for _ in range(5)
    )

    def __init__(self, shared: Bounded, layer: int, padded: bool = False) -> None:
        self.shared, self.layer, self.padded = shared, layer, padded

    @classmethod
    def from_state(cls, state: list[Any]) -> Loaded:
        """mlx-lm loads layers one by one; they are joined when the model first sees all of them."""
        return Loaded(state)

    @classmethod
    def owner_of(cls, keys: Any) -> BoundedKVCache | None:
        """The cache whose :meth:`update_and_fetch` returned exactly this array in the pass under way.

        Layers that share another's keys have no cache of their own.
        """
        shared = running.get()
        reading = None if shared is None else shared.reading
        owner: BoundedKVCache | None = None if reading is None else reading.fetchers.get(id(keys))
        return owner if owner is not None and owner.fetched and owner.fetched[0] is keys else None

    def on(self, shared: Bounded) -> BoundedKVCache:
        """The same layer's entry on other rows."""
        return BoundedKVCache(shared, self.layer, self.padded)

    @property
    def offset(self) -> Any:
        shared = self.shared
        if shared.batch:
            return shared.offsets(self.layer)
        came = 0 if self.fetched is None or shared.reading is None else shared.reading.counts[0]
        return shared.row.seen - shared.row.taken_back[self.layer] + came

    @property
    def _offset(self) -> int:
        """That of the longest row: mlx-vlm asks here first, where no device has to be waited for."""
        return self.size()

    @property
    def fetched(self) -> tuple[mx.array, mx.array] | None:
        """What :meth:`update_and_fetch` returned in this pass, or would have returned if not ``padded``."""
        reading = self.shared.reading
        return None if reading is None else reading.fetched[self.layer]

    def observe(self, x: mx.array) -> None:
        """Take in the layer's attention input (R, T, hidden)."""
        self._reading().observe(self.layer, x)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add the step's keys and values (R, H, T, D).

        Returns what :meth:`attend` is to be given: the window (1, H, r, D), of a batch the step's own; or, if
        ``padded``, all visible entries (1, H, W + r, D), W being the longest head of all layers.
        """
        reading = self._reading()
        fetched = reading.append(self.layer, keys, values)
        if not self.padded or self._width() == 0:
            reading.fetchers[id(fetched[0])] = self
            return fetched
        old_keys, old_values, _ = self.view().kept(0, keys.shape[1], self._width())
        return (
            mx.concatenate([old_keys[None], fetched[0]], axis=2),
            mx.concatenate([old_values[None], fetched[1]], axis=2),
        )

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """mlx-lm's ``scaled_dot_product_attention`` for this cache; (R, Hq, T, D) to (R, Hq, T, Dv)."""
        fetched, reading = self.fetched, self._reading()
        if not self.padded and fetched and keys is fetched[0] and values is fetched[1]:
            causal = isinstance(mask, str) or any(mask is made for made in reading.masks)
            if mask is None or causal:
                return reading.attend(self.layer, queries, scale, causal, sinks)
            if any(mask is made for made in reading.shown):
                width = self._width()
                kept = self.view().kept(0, keys.shape[1], width) if width else None
                return attend_both_ways(queries, fetched, kept, mask, scale, sinks)
        elif self.padded and isinstance(mask, mx.array):
            bias = self.padding_bias() + (mx.where(mask, 0.0, -mx.inf) if mask.dtype == mx.bool_ else mask)
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=bias.astype(queries.dtype), sinks=sinks
            )
        raise UnsupportedModelError(
            "this model's attention changes its mask or the cached keys in a way that cannot follow evicted "
            "entries; use another model"
        )

    @property
    def keys(self) -> mx.array:
        """The layer's newest keys in a pass, where layers are split over ranks.

        Models have them wait for what they send: what is put here holds the same values.
        """
        share = self.shared.arena.share
        if share is None or share.shape.layers == share.whole.layers:
            raise AttributeError("a bounded layer has no keys of its own that a model may change")
        return self._reading().newest_keys(self.layer)

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._reading().put_newest_keys(self.layer, keys)

    def view(self) -> LayerView:
        """What the layer attends to, after :meth:`update_and_fetch`."""
        assert self.fetched is not None
        return self._reading().view(self.layer)

    def padding_bias(self) -> mx.array:
        """0 for the real and -inf for the padded entries of :meth:`update_and_fetch`, (H, 1, W + r)."""
        view, width = self.view(), self._width()
        visible = mx.zeros((view.kv_heads, 1, width + view.keys.shape[2]))
        real = view.kept(0, view.kv_heads, width)[2] if width else None
        if real is not None:
            visible[:, 0, :width] = mx.where(real, 0.0, -mx.inf)
        return visible

    def _width(self) -> int:
        return int(np.diff(self.shared.arena.pool.lookup.on_host(self.shared.row.slab)).max())

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """mlx-lm's mask for N new tokens, as if every layer held the same entries, all of them visible."""
        reading = self._reading()
        if window_size is not None:
            raise UnsupportedModelError(
                f"this model masks a window of {window_size} tokens over a cache of all tokens, which has no "
                "meaning once entries are evicted; use a model with sliding-window caches"
            )
        if N == 1:
            return None
        if not (self.padded or return_array):
            return "causal"
        recent = max(row.length for row in reading.rows)
        places = mx.arange(-self._width() if self.padded else 0, recent + N)
        mask = places <= recent + mx.arange(N)[:, None]
        reading.masks.append(mask)
        return mask

    def _reading(self) -> Reading:
        reading = self.shared.reading
        if reading is None or running.get() is not self.shared:
            raise ModelMismatchError(
                "a bounded cache was given to a model that is not attached, or to a part of one; attach the "
                "model it was made for with mlx_kvret.attach(model, gates) and call the whole model, or give "
                "this one a cache of its own"
            )
        return reading

    # -------------------------------------------------- prompt files and trimming

    @property
    def state(self) -> list[Any]:
        """Arrays and strings that mlx-lm saves; the first layer carries what all share."""
        if not self.shared.batch:
            return layer_state(self.shared, self.layer)
        self.shared.settle()
        return self.shared.arrays() if self.layer == 0 else []

    @state.setter
    def state(self, state: list[Any]) -> None:
        raise CacheError("a bounded layer is not restored on its own; load the whole prompt file")

    def size(self) -> int:
        return max(row.seen for row in self.shared.rows)

    def empty(self) -> bool:
        return self.size() == 0

    @property
    def nbytes(self) -> int:
        return self.shared.layer_nbytes(self.layer)

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken back, for hosts ask no further: none was decided upon.

        :meth:`trim` takes back the newest ones at any time, and speculative decoding is answered in
        :mod:`mlx_kvret.mlx_backend.hosts`.
        """
        self.shared.passes.repair()
        if self.shared.batch:
            return False
        row = self.shared.row
        # of pictures not any number can be: they are forgotten as a whole
        return row.seen == row.length and row.next() is None and not row.pictures

    @property
    def start_position(self) -> int:
        """How many of the oldest tokens have been decided upon: 0 means that all are there still.

        mlx-vlm asks before it takes tokens back to go on from an earlier turn.
        """
        return 0 if self.shared.batch else self.shared.row.seen - self.shared.row.length

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens, or all if there are fewer.

        Raises:
            UnsupportedFeatureError: some of them have been through a compaction, which nothing brings back;
                or it is a batch.
        """
        self.shared.passes.repair()
        if self.shared.batch:
            raise UnsupportedFeatureError("tokens of a batch are not taken back; extract the row first")
        n, left = min(n, self.offset), self.shared.row.length - self.shared.row.taken_back[self.layer]
        if n > left:
            raise UnsupportedFeatureError(
                f"cannot take back {n} tokens: all but the newest {left} have been through a "
                "compaction; make a new cache and read the prompt again"
            )
        self.shared.trim(self.layer, n)
        return n


class BoundedCacheList(mlx_cache.CacheList):
    """mlx-lm's list of one layer's entries, of which one is bounded: without batches, which that one has not.

    Hosts ask the list, not its entries, which methods there are.
    """

    merge, extract, filter, extend, prepare, finalize = (Absent() for _ in range(6))


# mlx-lm's loader looks the classes of saved entries up by name in its own module
vars(mlx_cache).update(BoundedKVCache=BoundedKVCache, BoundedCacheList=BoundedCacheList)
