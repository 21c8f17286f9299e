"""The cache as transformers knows it: a layer object for each layer, and what concerns them all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from mlx_kvret.core.absent import Absent
from mlx_kvret.core.passes import Passes
from mlx_kvret.core.pictures import Modality, Pictures
from mlx_kvret.core.shares import Share
from mlx_kvret.core.state import State
from mlx_kvret.core.types import Ints
from mlx_kvret.errors import ConfigError, ModelMismatchError, UnsupportedFeatureError

from . import stock_layers
from .bounded import Bounded
from .layer import BoundedKVCache, running
from .modes import ordinary
from .naming import cache_argument as cache_argument
from .naming import cache_name as cache_name
from .ranks import patient
from .ring import Rings
from .sight import Sight


class BoundedCache(Cache):
    """A cache for ``past_key_values``: one layer object per layer, and figures over all of them.

    Competing layers are :class:`BoundedKVCache`; sliding-window and state-space layers keep their own kind.
    ``shared`` is None if nothing is ever evicted (policy ``"full"``); else what cannot be done is absent.
    """

    reorder_cache, offload, prefetch, reset, batch_repeat_interleave, batch_select_indices = (
        Absent(unless=lambda cache: cache.shared is None) for _ in range(6)
    )

    stock_share: Share | None = None  # of several ranks' caches that evict nothing

    def __init__(self, layers: list[Any], shared: Bounded | None, competing: list[Any]) -> None:
        super().__init__(layers=layers)
        self.shared, self.competing = shared, competing
        self._others = [layer for layer in layers if not isinstance(layer, BoundedKVCache)]
        self.passes = Passes() if shared is None else shared.passes
        # of the pass under way: by id of the keys, whose they are
        self.fetchers: dict[int, BoundedKVCache] = {}
        # of sliding-window layers, where they are ahead of these
        self.rings: Rings | None = None
        self._identity, self._trial = "", False
        self.sight = Sight(shared)

    @property
    def identity(self) -> str:
        """The model and gates it belongs to."""
        return self._identity if self.shared is None else self.shared.arena.identity

    @identity.setter
    def identity(self, identity: str) -> None:
        if self.shared is not None:
            self.shared.arena.identity = identity
        self._identity = identity

    @property
    def share(self) -> Share | None:
        """What this process holds of it, where several hold the model together."""
        return self.stock_share if self.shared is None else self.shared.arena.share

    @patient
    def run(self, forward: Callable[[], Any]) -> Any:
        """What ``forward()`` returns, a forward pass into this cache, which is undone if it is broken off."""
        self.settle()
        passes = self.passes
        if self.shared is not None:
            self.shared.arena.reader = id(self)
        try:
            passes.begin(self._before())
            out = forward()
            if self._trial:
                passes.undo()
            else:
                self.sight.commit()
                if self.shared is not None:
                    self.shared.commit()
            self._release()
            passes.commit()
            return out
        except BaseException:
            passes.running = False
            if self.in_place:
                self.lose(
                    "a forward pass was broken off in a model of state-space layers, which change in place"
                )
            passes.undo()
            self._release()
            raise

    def _before(self) -> State:
        """What undoes a pass."""
        stock = State.all([State.of(self._stock()), self.sight.before()])
        return stock if self.shared is None else State.all([stock, self.shared.before()])

    @property
    def in_pass(self) -> bool:
        """Whether its own pass is under way, not that of another cache of the arena."""
        mine = self.shared is None or self.shared.arena.reader == id(self)
        return mine and self.passes.under_way

    @property
    def in_place(self) -> bool:
        """Whether layers change in place, so that a pass cannot be undone."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    def _release(self) -> None:
        """Forget what was fetched: a slice that is referred to would keep the memory of a whole chunk."""
        self.fetchers = {}
        self.sight.release()
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
        self._put_back()

    def take_back(self, count: int) -> bool:
        """Forget the newest ``count`` tokens, of a full window for which that is too late they are not."""
        self.passes.repair()
        try:
            self.crop(-count)
        except (UnsupportedFeatureError, ValueError, RuntimeError, NotImplementedError):
            return False
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens in all layers, or in none.

        Raises:
            UnsupportedFeatureError: some of them have been through a compaction, which nothing brings back.
        """
        self.passes.repair()
        # a number that transformers has counted on the device
        removed, most = int(tokens_to_remove), None if self.shared is None else self.shared.to_take_back
        if most is not None and (removed > 0 or -removed > most):
            raise UnsupportedFeatureError(
                f"cannot crop by {removed}: give minus the number of tokens to take back, at most {most}, "
                "for older ones have been through a compaction; or make a new cache"
            )
        passes, kept = self.passes, self.seen + min(removed, 0)
        try:
            passes.begin(self._before())
            self.sight.forget(kept, -removed)
            for layer in self._stock():
                layer.crop(removed)
            if self.shared is not None:
                self.shared.take_back(-removed)
            passes.commit()
        except BaseException:
            passes.undo()
            raise

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Forward passes inside are undone at their end."""
        self._trial = True
        try:
            yield
        finally:
            self._trial = False

    @property
    def stock(self) -> list[Any]:
        """Layers that do not compete, as they are: while steps are repeated, behind their ``rings``."""
        return self._others

    def _stock(self) -> list[Any]:
        """Layers that do not compete, up to date."""
        self._put_back()
        return self._others

    @ordinary
    def _put_back(self) -> None:
        if self.rings is not None:
            self.rings.put_back(self.shared.places if self.shared is not None else 0)
            self.rings = None

    @property
    def seen(self) -> int:
        """Tokens seen so far; of a batch the most of any row, or the places of it, padding included."""
        self.passes.repair()
        return self.sight.places(self.competing)

    @property
    def entries(self) -> int:
        """Cached entries of the competing layers: one token in one KV head of one layer each."""
        if self.shared is not None:
            return self.shared.entries
        return stock_layers.entries(self.competing, self.stock_share)

    @property
    def nbytes(self) -> int:
        """Bytes of everything cached: keys, values, retention, positions, tables, waiting gate inputs."""
        return stock_layers.all_nbytes(self)

    def kept_positions(self, row: int = 0, modality: Modality | None = None) -> list[list[Ints]]:
        """For each competing layer, for each KV head, the sorted positions of a sequence's entries.

        With a ``modality`` those of ``"text"`` or of ``"picture"`` only.
        """
        return self.sight.kept(self.competing, row, modality, self.stock_share)

    @property
    def pictures(self) -> Pictures:
        """The pictures among the tokens seen, first to last, of the first sequence."""
        self.passes.repair()
        return next(iter(self.sight.pictures(self.rows)), ())

    # ------------------------------------------------------------------ rows

    @property
    def rows(self) -> int:
        """Sequences it holds."""
        if self.shared is not None:
            return len(self.shared.rows)
        return next((len(c.keys) for c in self.competing if c.keys is not None), 1)

    def copy(self) -> BoundedCache:
        """A cache of the same sequences, which costs nothing until either is written to.

        The two share arrays, so that they belong to one thread; ``copy.deepcopy`` shares nothing.
        """
        self.settle()
        if self.shared is None:
            return copy.deepcopy(self)
        return self._with(self.shared.copy(), copy.deepcopy(self._stock()))

    def row(self, index: int) -> BoundedCache:
        """A single sequence of it, in a cache that later passes do not touch; it costs as much as a copy.

        Raises:
            ConfigError: there is no such row.
            UnsupportedFeatureError: it began with padding, which a layer that does not compete has kept.
        """
        self._check_rows([index])
        if self.shared is None:
            found = self.copy()
            found.filter([index])
            return found
        if self.shared.padding[index]:
            # which such a layer has kept, and a single sequence has no mask for
            self.check_clocks()
        return self._with(self.shared.extract(index), self._picked([index]))

    def filter(self, keep: Sequence[int]) -> None:
        """Keep these rows, in this order.

        Raises:
            ConfigError: there is no such row, or one is named twice.
        """
        self._check_rows(keep)
        if self.shared is None:
            self.batch_select_indices(torch.tensor(list(keep)))
            self.sight.pick(keep)
            return
        self.settle()
        stock = zip(self._stock(), self._picked(keep), strict=True)
        self.shared.filter(keep)
        State.becoming(stock).put()

    def split(self, which: Sequence[int]) -> BoundedCache:
        """These rows leave for a cache of their own, in this order."""
        leaving = self.copy()
        leaving.filter(which)
        self.filter([at for at in range(self.rows) if at not in set(which)])
        return leaving

    def extend(self, other: BoundedCache) -> None:
        """Append another cache's rows, whose clocks may differ; they leave it.

        Raises:
            ModelMismatchError: they belong to another model or other gates.
            UnsupportedFeatureError: they compete by another rule, or have layers that know one clock only.
        """
        self.check_joins(other)
        assert self.shared is not None and other.shared is not None
        self.shared.extend(other.shared)

    def check_joins(self, other: BoundedCache) -> None:
        """Refuse rows that :meth:`extend` would not take. Raises as that does."""
        if self.shared is None or other.shared is None:
            raise UnsupportedFeatureError(
                "caches that evict nothing (policy 'full') do not join; read the prompts as one batch"
            )
        self.check_clocks()
        self.shared.check_joins(other.shared)

    def reserve(self, count: int) -> None:
        """Have room for so many rows to join, so that their arrays grow once."""
        if self.shared is not None:
            self.settle()
            self.shared.arena.reserve(count)

    def check_clocks(self) -> None:
        """Refuse rows that read at their own pace where a layer has one clock for all.

        Raises:
            UnsupportedFeatureError: names the kind of layer.
        """
        if stock := self._stock():
            raise UnsupportedFeatureError(
                f"{type(stock[0]).__name__} layers have one clock for all rows, so that rows cannot join; "
                "use one cache for each sequence, or read them as one batch"
            )

    def prepare(self, lengths: Sequence[int]) -> None:
        """The next pass brings so many tokens to each row, padded on the right.

        Raises:
            ConfigError: they are not as many as rows, or the cache evicts nothing.
        """
        if self.shared is None:
            raise UnsupportedFeatureError("a cache of policy 'full' knows padding by its mask only; give one")
        self.check_clocks()
        self.shared.prepare(lengths)

    def _check_rows(self, which: Sequence[int]) -> None:
        if bad := [at for at in which if not 0 <= at < self.rows]:
            raise ConfigError(f"row {bad[0]} is not one of the cache's {self.rows}; count from 0")
        if len(set(which)) < len(which):
            raise ConfigError(f"rows {list(which)} name one twice; copy the cache to have it twice")

    def lose(self, reason: str) -> None:
        """What the sequences hold is not known any more, so that they cannot go on."""
        if self.shared is None:
            self.passes.lose(reason)
        else:
            self.shared.lose(reason)

    @property
    def lost(self) -> bool:
        """Whether it cannot go on."""
        return bool(self.passes.lost or (self.shared and any(row.lost for row in self.shared.rows)))

    def _picked(self, which: Sequence[int]) -> list[Any]:
        """Copies of the layers that do not compete, with these rows only."""
        picked = copy.deepcopy(self._stock())
        for layer in picked:
            if self.seen:
                layer.reorder_cache(torch.tensor(list(which)))
        return picked

    def _with(self, shared: Bounded, stock: list[Any]) -> BoundedCache:
        """A cache of the same layers on other rows."""
        competing = [BoundedKVCache(shared, layer.layer) for layer in self.competing]
        others, ours = iter(stock), iter(competing)
        layers = [next(ours if isinstance(layer, BoundedKVCache) else others) for layer in self.layers]
        return BoundedCache(layers, shared, competing)

    @ordinary
    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedCache:
        self.settle()
        if self.shared is not None:
            memo[id(self)] = twin = self._with(self.shared.own_copy(), copy.deepcopy(self._stock(), memo))
            return twin
        layers = copy.deepcopy(self.layers, memo)
        # memo maps each old layer to its copy
        twin = BoundedCache(layers, None, copy.deepcopy(self.competing, memo))
        twin.sight.like(self.sight)
        twin.identity, twin.stock_share = self.identity, self.stock_share
        return twin
