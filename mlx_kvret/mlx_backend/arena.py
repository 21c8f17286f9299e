"""What sequences in one set of arrays share: the pool, the recent windows, the gates and the passes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol
from weakref import WeakSet, ref

import mlx.core as mx

from ..core.bits import packings
from ..core.budget import CacheShape
from ..core.config import EvictionConfig
from ..core.eviction import heads_per_group
from ..core.passes import Passes
from ..core.shares import Share
from ..core.slabs import Slabs
from ..core.state import State
from ..errors import CacheError
from .observed import Observed, Piece, scored
from .pool import Pool
from .recent import Recent

if TYPE_CHECKING:
    from .gates import RetentionGates


class Holder(Protocol):
    """A sequence as its arena sees it: its slab, and what it holds beside that."""

    pieces: list[Piece]

    @property
    def slab(self) -> int: ...

    def arrays(self) -> list[mx.array]: ...


class Arena:
    """Slabs in one set of arrays; a slab is the room of one sequence, or of several that are still equal.

    ``config`` is the largest budget and buffer of its rows, and the policy and scope of all of them. All rows
    belong to one thread: while a pass is under way no other begins. Changes are decided upon first and then
    put in place, whole or not at all, by :meth:`put`. ``owner`` names the model and the gates, for caches
    saved to a file, ``identity`` the very weights too. ``shape`` is what this process holds, its ``share`` of
    the whole where several hold the model together.
    """

    def __init__(
        self,
        shape: CacheShape,
        config: EvictionConfig,
        owner: dict[str, str],
        gates: RetentionGates | None = None,
        gate_layers: Sequence[int] | None = None,
        slabs: int = 1,
        share: Share | None = None,
    ) -> None:
        self.shape, self.config, self.owner, self.share = shape, config, owner, share
        self.gates, self.gate_layers = gates, gate_layers
        self.identity = ""
        self.reach: int | None = None
        self.size = heads_per_group(config, shape.layers, shape.kv_heads)
        forms = packings(config.kv_bits, shape.key_dim, shape.value_dim)
        self.pool = Pool(shape.heads // self.size, self.size, slabs, forms)
        self.recent = Recent(shape.layers, max(1, config.buffer), slabs)
        self.slabs, self.rows = Slabs(slabs), WeakSet[Holder]()
        self.passes = Passes()
        # passes whose inputs no gate has been asked for, oldest first
        self.unscored: list[ref[Observed]] = []
        self._decided: State | None = None

    def gate(self, layer: int, x: mx.array) -> mx.array:
        """log β (N, H) of a competing layer's attention inputs (N, hidden)."""
        assert self.gates is not None
        found = self.gates.log_beta(self.gate_layers[layer] if self.gate_layers else layer, x)
        return self._own(found)

    def gate_all(self, given: Sequence[Sequence[mx.array]]) -> mx.array:
        """log β (L, N, H) of all competing layers' attention inputs, each layer's in parts (·, hidden)."""
        assert self.gates is not None
        layers = tuple(self.gate_layers or range(self.shape.layers))
        if self.gates.stacked != layers:
            return mx.stack([self.gate(layer, mx.concatenate(list(own))) for layer, own in enumerate(given)])
        x = mx.concatenate([part for own in given for part in own])
        return self._own(self.gates.log_betas(x.reshape(len(layers), -1, x.shape[-1])))

    def _own(self, log_beta: mx.array) -> mx.array:
        """This rank's heads of all that the gates know."""
        if self.share is None:
            return log_beta
        return log_beta[..., self.share.head :][..., : self.shape.kv_heads]

    @property
    def whole(self) -> CacheShape:
        """The shape over all ranks."""
        return self.shape if self.share is None else self.share.whole

    @property
    def defer(self) -> int:
        """How many tokens' inputs may wait for their gate."""
        return self.shape.deferred(self.config.budget, self.config.buffer, self.config.kv_bits)

    # ------------------------------------------------------------------ changes, whole or not at all

    def check(self) -> None:
        """Carry out what was broken off, or refuse to go on.

        Raises:
            CacheError: a pass is under way, or the caches of the arena cannot go on.
        """
        self.passes.check()
        if self._decided is not None:
            self.put(self._decided)

    def put(self, state: State) -> None:
        """Put a change in place; if that is broken off, :meth:`check` does it again."""
        self._decided = state
        state.put()
        self._decided = None

    def compute(self, arrays: Any, wait: bool = False) -> None:
        """Have MLX compute; what it fails at it says now, if ``wait``, or to whoever waits next."""
        self.passes.in_flight |= not wait
        try:
            (mx.eval if wait else mx.async_eval)(arrays)
        except Exception as error:
            self.lose(error)

    def lose(self, error: BaseException) -> NoReturn:
        """MLX failed at something that the arena holds."""
        reason = str(error).partition("\n")[0]
        self.passes.lose(f"MLX failed while it computed what the cache holds ({reason})")
        raise CacheError(self.passes.lost) from error

    def score(self, wait: bool = False) -> None:
        """Ask the gates for all tokens that wait, of all rows."""
        if waiting := self.waiting():
            self.put(scored(waiting, self.gate_all))
            self.put(State([(self, {"unscored": []})]))
            self.compute([waiting[0].log_beta], wait)

    def waiting(self) -> list[Observed]:
        """What waits for its gates and still belongs to somebody."""
        found = (one() for one in self.unscored)
        return [one for one in found if one is not None and one.log_beta is None]

    # ------------------------------------------------------------------ slabs

    def take(self, slab: int, pool: Pool, recent: Recent, source: int, length: int) -> None:
        """What another pool of the same capacity, or this one, and windows hold of slab ``source``."""
        own_pool, own_recent = copy.copy(self.pool), self.recent.copy()
        own_pool.take(slab, pool, source)
        own_recent.take(slab, recent, source, length)
        self.put(State.becoming([(self.pool, own_pool), (self.recent, own_recent)]))

    def reserve(self, count: int) -> None:
        """Have ``count`` free slabs: as many as needed, or a few more in a large arena."""
        used = len(self.slabs.used)
        if self.slabs.count - used < count:
            # one in nine for those that come next
            self._resize(used + count + (used + count) // 8)

    def tidy(self) -> None:
        """Give memory back when less than half of the slabs are used."""
        used = len(self.slabs.used)
        if used and 2 * used < self.slabs.count:
            self._resize(used)

    def _resize(self, count: int) -> None:
        kept = self.slabs.used
        pool, recent = self.pool.resized(kept, count), self.recent.resized(kept, count)
        try:
            self.put(State.becoming([(self.pool, pool), (self.recent, recent)]))
            self.slabs.resize(count)
        except BaseException:
            self.passes.lose("the arena of this cache was broken off while it was moved")
            raise
        del pool, recent
        # one by one, so that no two of the old arrays stand beside their copies
        for array in (*self.pool.arrays(), *self.recent.arrays()):
            self.compute(array, wait=True)

    def level(self, other: Arena) -> None:
        """Have room for what the other arena's rows may hold."""
        ours, theirs = self.config, other.config
        budget, buffer = max(ours.budget, theirs.budget), max(ours.buffer, theirs.buffer)
        if (budget, buffer) != (ours.budget, ours.buffer):
            recent = self.recent.copy()
            recent.buffer = max(1, buffer)
            config = replace(ours, budget=budget, buffer=buffer)
            self.put(State([(self, {"config": config}), (self.recent, vars(recent))]))
        if self.pool.capacity < other.pool.capacity:
            pool = copy.copy(self.pool)
            pool.grow_like(other.pool)
            self.put(State.becoming([(self.pool, pool)]))

    def like(self, slabs: int, config: EvictionConfig | None = None) -> Arena:
        """An empty arena for the same model and gates."""
        told = self.owner, self.gates, self.gate_layers, slabs, self.share
        made = Arena(self.shape, config or self.config, *told)
        made.identity, made.reach = self.identity, self.reach
        return made

    # ------------------------------------------------------------------ looking

    def newest(self) -> list[Any]:
        """What a pass changes, to be evaluated."""
        observed = {id(one): one for row in self.rows for one, _, _ in row.pieces[-1:]}
        own = [row.arrays() for row in self.rows]
        return [self.recent.arrays(), own, [one.arrays() for one in observed.values()]]

    def arrays(self) -> list[Any]:
        """Everything to be evaluated."""
        observed = {id(one): one for row in self.rows for one, _, _ in row.pieces}
        own = [row.arrays() for row in self.rows]
        return [self.pool.arrays(), self.recent.arrays(), own, [one.arrays() for one in observed.values()]]

    def evaluate(self) -> None:
        """Compute what was built, which another thread could not: MLX's streams are those of a thread."""
        mx.eval(self.arrays(), self.pool.lookup.table, self.pool.lookup.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of everything in the arena, idle slabs included; what rows share is counted once."""
        seen = {id(a): a.nbytes for row in self.rows for a in row.arrays()}
        observed = {id(one): one for row in self.rows for one, _, _ in row.pieces}
        seen |= {id(a): a.nbytes for one in observed.values() for a in one.arrays()}
        return self.pool.nbytes + self.recent.nbytes + sum(seen.values())

    def slab_nbytes(self, rows: Sequence[Holder]) -> int:
        """Bytes of the slabs of ``rows``, each once, and of what they hold beside them."""
        slabs = {row.slab for row in rows}
        share = (self.pool.nbytes + self.recent.nbytes) * len(slabs) // self.slabs.count
        wide = {id(a): a.nbytes for row in rows for a in row.arrays()}
        scores = {(id(one), start): one.part(start, end) for row in rows for one, start, end in row.pieces}
        return share + sum(wide.values()) + sum(scores.values())
