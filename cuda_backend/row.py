"""One sequence of an arena: its slab, its clock and its own budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.pictures import next_position
from mlx_kvret.core.row import BaseRow
from mlx_kvret.core.slabs import Hold

from .arena import Arena
from .pool import Slab
from .selection import static_score


class Chunk:
    """Newest tokens that are too many for a window, until the next compaction: (1, H, n, D) by layer.

    ``log_beta`` (L, H, n) is None where there are no gates.
    """

    def __init__(self, layers: int, log_beta: torch.Tensor | None) -> None:
        self.keys: list[torch.Tensor] = [torch.empty(0)] * layers
        self.values: list[torch.Tensor] = [torch.empty(0)] * layers
        self.log_beta = log_beta


class Row(BaseRow):
    """A sequence that has seen ``seen`` tokens, the last ``length`` of which are not in the pool.

    Of these the gates have scored the first ``scored``. They stand in the slab's window, or in ``chunk``.
    ``lost`` says why the sequence cannot go on, ``pictures`` which of its tokens are pictures.
    """

    def __init__(self, arena: Arena, config: EvictionConfig, hold: Hold) -> None:
        super().__init__(arena, config, hold)
        self.scored = 0
        self.chunk: Chunk | None = None
        self.lost = ""

    @classmethod
    def new(cls, arena: Arena, config: EvictionConfig) -> Row:
        """An empty sequence, on a slab of its own."""
        arena.raise_to(config)
        return cls(arena, config, arena.take())

    @property
    def slab(self) -> Slab:
        return self.arena.pool.slab(self.hold.index)

    @property
    def next(self) -> int:
        """The rotary position of the token that comes next."""
        return next_position(self.pictures, self.seen)

    @property
    def waiting(self) -> int:
        """Newest tokens whose gate inputs wait."""
        return self.length - self.scored if self.arena.gates is not None else 0

    @property
    def undecided(self) -> bool:
        """Whether no compaction has decided upon any token yet, nor is to."""
        return self.seen == self.length and self.schedule.next(self.seen, self.length) is None

    def twin(self) -> Row:
        """The same sequence once more, on the same slab until either is written to."""
        return self._told(Row(self.arena, self.config, self.arena.slabs.share(self.hold)))

    def copied(self, arena: Arena) -> Row:
        """The same sequence, settled, in another arena, on a slab of its own."""
        run_gates([self])
        twin = self._told(Row.new(arena, self.config))
        theirs = self.arena.pool
        # a rank may hold more than the mean
        most = self.schedule.most if arena.share is None else theirs.capacity
        if (capacity := min(theirs.capacity, most)) > arena.pool.capacity:
            arena.pool.grow(capacity, *theirs.like)
        twin.slab.adopt(self.slab)
        for layer in range(arena.shape.layers) if self.length else ():
            newest = self.newest(layer, 0, self.length)
            arena.recent.reserve(self.length, arena.limit, *newest)
            for mine, own in zip(twin.newest(layer, 0, self.length), newest, strict=True):
                mine.copy_(own)
        if self.length and arena.gates is not None:
            twin.scores(self.length).copy_(self.scores(self.length))
        return twin

    def _told(self, twin: Row) -> Row:
        """``twin`` with this row's clock and counts."""
        for name in ("schedule", "seen", "length", "scored", "chunk", "lost", "pictures"):
            setattr(twin, name, getattr(self, name))
        return twin

    def own(self) -> None:
        """Have the slab to itself before it is written to; there is room for one."""
        if self.arena.slabs.shared(self.hold):
            self.arena.separate(self.hold)

    def newest(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (1, H, end - start, D) of a layer's newest tokens."""
        if self.chunk is None:
            return self.arena.recent.slices(layer, self.hold.index, start, end)
        keys, values = self.chunk.keys[layer], self.chunk.values[layer]
        return keys[:, :, start:end], values[:, :, start:end]

    def scores(self, end: int) -> torch.Tensor:
        """log β (L, H, end) of the oldest of the newest tokens, to be read and written."""
        if self.chunk is not None:
            assert self.chunk.log_beta is not None
            return self.chunk.log_beta[:, :, :end]
        return self.arena.recent.reserve_scores(end, self.arena.limit)[:, self.hold.index, :, :end]

    def retention(self, tokens: int) -> torch.Tensor:
        """What is stored with the oldest ``tokens`` of the newest ones, (L, H, tokens) float32."""
        shape = self.arena.shape
        if self.config.policy == "learned":
            run_gates([self])
            return self.scores(tokens)
        start = self.seen - self.length
        position = torch.arange(start, start + tokens, device=self.arena.device)[None]
        share, device = self.arena.share, self.arena.device
        own = torch.arange(shape.heads) if share is None else torch.from_numpy(share.heads).long()
        heads = own.to(device).view(shape.layers, -1)
        kept = self.arena.pool.as_kept if self.config.policy == "knorm" else lambda keys: keys
        return torch.cat(
            [
                static_score(self.config, kept(self.newest(layer, 0, tokens)[0]), head, position)
                for layer, head in enumerate(heads)
            ]
        )


def run_gates(rows: Sequence[Row]) -> None:
    """Score all gate inputs of rows of one arena that wait, in one call."""
    waiting = [row for row in rows if row.waiting]
    if not waiting:
        return
    arena = waiting[0].arena
    assert arena.recent.inputs is not None
    held = [arena.recent.inputs[:, row.hold.index, : row.waiting] for row in waiting]
    x = held[0] if len(held) == 1 else torch.cat(held, 1)
    parts = arena.log_beta(x[:, None])[:, 0].split([row.waiting for row in waiting], 1)
    for row, log_beta in zip(waiting, parts, strict=True):
        row.scores(row.length)[:, :, row.scored :] = log_beta.mT
        row.scored = row.length
