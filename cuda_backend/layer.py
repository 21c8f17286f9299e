"""One competing layer as transformers knows it; layers of a cache share a budget."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from mlx_kvret.core.absent import Absent
from mlx_kvret.errors import CacheError

from .bounded import Bounded
from .kernels.dispatch import attend, attend_rows
from .modes import ordinary
from .reading import Reading

# the cache of the forward pass that is under way, or None
running: ContextVar[Any] = ContextVar("kvret_cache", default=None)


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
        self.reading.observe(self.layer, x)

    @ordinary
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the step's keys and values (R, H, T, D).

        Returns the newest ones of a row that is alone, (1, H, r, D), from which :mod:`cuda_backend.attention`
        goes on to the pool.
        """
        self.fetched = self.reading.append(self.layer, key_states.detach(), value_states.detach())
        if (cache := running.get()) is not None:
            cache.fetchers[id(self.fetched[0])] = self
        return self.fetched

    def attend(
        self,
        queries: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
        block: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the step's queries (R, Hq, T, D) over all this layer holds: (R, Hq, T, Dv).

        Padding gets zeros. ``block`` (R, T, T) tells which of the step's tokens see each other, if not those
        before them alone.
        """
        self.attended += queries.shape[2]
        if (chunks := self.reading.chunks(self.layer)) is not None:
            return attend_rows(queries, chunks, scale, sinks, softcap, block)
        views = self.reading.views(self.layer)
        if len(views) == 1 and self.reading.whole:
            return attend(queries, views[0][2], scale, sinks, softcap, block)
        out = queries.new_zeros(*queries.shape[:3], self.shared.shape.value_dim)
        for at, part, view in views:
            own = None if block is None else block[at, part, part]
            out[at, :, part] = attend(queries[at, :, part], view, scale, sinks, softcap, own)
        return out

    @property
    def reading(self) -> Reading:
        """The pass under way."""
        if self.shared.reading is None:
            raise CacheError("no pass is under way in this cache; call the whole model with it")
        return self.shared.reading

    # -------------------------------------------------- what transformers asks, and what cannot work

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        """Places so far, padding included."""
        reading = self.shared.reading
        read = reading.tokens if reading is not None and reading.done[self.layer] else 0
        return self.shared.places + read

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
        return self.record_past or all(row.undecided for row in self.shared.rows)

    # tokens are taken back in all layers or in none: BoundedCache.crop
    crop, reorder_cache, offload, prefetch, reset = (Absent() for _ in range(5))


def tensors(values: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors held by a stock layer, also those in its dictionaries of states."""
    nested = [v for value in values.values() if isinstance(value, dict) for v in value.values()]
    return [v for v in [*values.values(), *nested] if isinstance(v, torch.Tensor)]
