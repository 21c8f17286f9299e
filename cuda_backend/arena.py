"""What many sequences share: one set of arrays in which each has a slab, and who holds which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from mlx_kvret.core.bits import packings
from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import heads_per_group
from mlx_kvret.core.passes import Passes
from mlx_kvret.core.shares import Share
from mlx_kvret.core.slabs import Hold, Slabs
from mlx_kvret.core.state import State

from .gates import RetentionGates
from .pool import Pool
from .recent import Recent


class Change(Protocol):
    """What has been decided upon; put twice, because it was broken off, it comes to the same."""

    def put(self) -> None: ...


class Resize:
    """Another number of slabs, those in use first."""

    def __init__(self, arena: Arena, count: int) -> None:
        self._arena, self._count = arena, count
        # until this is done no slab becomes free
        self._holds, sources = arena.slabs.holds, arena.slabs.used
        pool, recent = arena.pool, arena.recent
        made = (pool, pool.resized(count, sources)), (recent, recent.resized(count, sources))
        self._arrays = State(made)

    def put(self) -> None:
        self._arrays.put()
        self._arena.slabs.resize(self._count)


class Arena:
    """Sequences of one model, gates, policy and scope: a slab of M·L·H slots and B newest tokens for each.

    ``config`` has the largest M and B of any row. ``owner`` names the model and the gates, for caches saved
    to a file, ``identity`` the very weights too. ``shape`` is what this process holds, its ``share`` of the
    whole where several hold the model together. One pass at a time is under way in an arena: it belongs to
    one thread.
    """

    def __init__(
        self,
        shape: CacheShape,
        config: EvictionConfig,
        owner: dict[str, str],
        device: torch.device,
        gates: RetentionGates | None = None,
        gate_layers: Sequence[int] | None = None,
        share: Share | None = None,
    ) -> None:
        self.shape, self.config, self.owner, self.device = shape, config, owner, device
        self.share = share
        self.gates, self.gate_layers = gates, tuple(gate_layers or range(shape.layers))
        self.size = heads_per_group(config, shape.layers, shape.kv_heads)
        # g: as many tokens' gate inputs wait
        self.defer = shape.deferred(config.budget, config.buffer, config.kv_bits)
        self.slabs = Slabs(1)
        forms = packings(config.kv_bits, shape.key_dim, shape.value_dim)
        self.pool = Pool(1, shape.heads // self.size, self.size, device, forms)
        self.recent = Recent(shape, 1, self.defer, device)
        self.passes, self.identity = Passes(), ""
        self.reach: int | None = None
        # whose pass is under way
        self.reader = 0
        self._decided: Change | None = None

    @property
    def whole(self) -> CacheShape:
        """The shape over all ranks."""
        return self.shape if self.share is None else self.share.whole

    @property
    def limit(self) -> int:
        """Most tokens in a window; a threshold may leave B of them when one more comes."""
        return max(1, self.config.buffer) + (self.config.threshold is not None)

    def fresh(self) -> Arena:
        """An empty arena for the same sequences."""
        twin = Arena(
            self.shape, self.config, self.owner, self.device, self.gates, self.gate_layers, self.share
        )
        twin.identity, twin.reach = self.identity, self.reach
        return twin

    # ------------------------------------------------------------------ changes, whole or not at all

    def put(self, change: Change) -> None:
        """Put a change in place; if that is broken off, :meth:`check` does it again."""
        self._decided = change
        change.put()
        self._decided = None

    def check(self) -> None:
        """Put in place what was broken off.

        Raises:
            CacheError: a pass is under way.
        """
        self.passes.check()
        if self._decided is not None:
            self.put(self._decided)

    # ------------------------------------------------------------------ slabs

    def raise_to(self, config: EvictionConfig) -> None:
        """Have room for rows of that budget too."""
        budget, buffer = (max(getattr(c, n) for c in (self.config, config)) for n in ("budget", "buffer"))
        threshold = self.config.threshold or config.threshold
        if (budget, buffer, threshold) != (self.config.budget, self.config.buffer, self.config.threshold):
            self.config = replace(self.config, budget=budget, buffer=buffer, threshold=threshold)

    def reserve(self, count: int) -> None:
        """Have ``count`` free slabs: exactly as many, or an eighth of all where that is more."""
        used, all_slabs = len(self.slabs.used), self.slabs.count
        if used + count > all_slabs:
            self.put(Resize(self, max(used + count, all_slabs + all_slabs // 8)))

    def tidy(self) -> None:
        """Give back what was taken for more than twice as many sequences."""
        used = max(1, len(self.slabs.used))
        if 2 * used < self.slabs.count:
            self.put(Resize(self, used))

    def take(self) -> Hold:
        """A hold on an empty slab."""
        if len(self.slabs.used) == self.slabs.count:
            self.reserve(1)
        hold = self.slabs.take()
        self.pool.slab(hold.index).clear()
        self.recent.clear(hold.index)
        return hold

    def separate(self, hold: Hold) -> None:
        """Give a holder a slab of its own that holds what it shared with others."""
        self.reserve(1)
        target = self.slabs.take().index
        self.pool.copy_slab(hold.index, target)
        self.recent.copy_slab(hold.index, target)
        self.slabs.move(hold, target)

    def log_beta(self, x: torch.Tensor) -> torch.Tensor:
        """Gate inputs (L, 1, N, hidden) of all layers to log β (L, 1, N, H)."""
        assert self.gates is not None
        if self.gates.stacked == self.gate_layers:
            return self._own(self.gates.log_betas(x))
        found = [self.gates.log_beta(*one) for one in zip(self.gate_layers, x, strict=True)]
        return self._own(torch.stack(found))

    def gate(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Gate inputs (..., hidden) of a competing layer to log β (..., H)."""
        assert self.gates is not None
        return self._own(self.gates.log_beta(self.gate_layers[layer], x))

    def _own(self, log_beta: torch.Tensor) -> torch.Tensor:
        """This rank's heads of all that the gates know."""
        if self.share is None:
            return log_beta
        return log_beta[..., self.share.head :][..., : self.shape.kv_heads]

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, in use or not."""
        return self.pool.nbytes + self.recent.nbytes
