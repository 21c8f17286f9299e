"""One sequence of an arena: its slab, its clock and its own budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.schedule import Schedule
from mlx_kvret.core.slabs import Hold

from .pool import Slab
from .selection import static_score

if TYPE_CHECKING:
    from .arena import Arena


class Chunk:
    """Newest tokens that are too many for a window, until the next compaction: (1, H, n, D) by layer.

    ``log_beta`` (L, H, n) is None where there are no gates.
    """

    def __init__(self, layers: int, log_beta: torch.Tensor | None) -> None:
        self.keys: list[torch.Tensor] = [torch.empty(0)] * layers
        self.values: list[torch.Tensor] = [torch.empty(0)] * layers
        self.log_beta = log_beta


class Row:
    """A sequence that has seen ``seen`` tokens, the last ``length`` of which are not in the pool.

    Of these the gates have scored the first ``scored``. They stand in the slab's window, or in ``chunk``.
    ``lost`` says why the sequence cannot go on.
    """

    def __init__(self, arena: Arena, config: EvictionConfig, hold: Hold) -> None:
        self.arena, self.config, self.hold = arena, config, hold
        self.schedule = Schedule(config, arena.pool.groups, arena.size)
        self.seen = self.length = self.scored = 0
        self.chunk: Chunk | None = None
        self.lost = ""

    @property
    def slab(self) -> Slab:
        return self.arena.pool.slab(self.hold.index)

    @property
    def waiting(self) -> int:
        """Newest tokens whose gate inputs wait."""
        return self.length - self.scored if self.arena.gates is not None else 0

    @property
    def undecided(self) -> bool:
        """Whether no compaction has decided upon any token yet, nor is to."""
        return self.seen == self.length and self.schedule.next(self.seen, self.length) is None

    @property
    def entries(self) -> int:
        """Cached entries over all layers and heads."""
        return int(self.schedule.counts.sum()) + self.length * self.arena.shape.heads

    def twin(self) -> Row:
        """The same sequence once more, on the same slab until either is written to."""
        twin = Row(self.arena, self.config, self.arena.slabs.share(self.hold))
        return self.onto(twin)

    def onto(self, twin: Row) -> Row:
        """``twin`` with this row's clock and counts."""
        for name in ("schedule", "seen", "length", "scored", "chunk", "lost"):
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
            self.arena.run_gates([self])
            return self.scores(tokens)
        start = self.seen - self.length
        position = torch.arange(start, start + tokens, device=self.arena.device)[None]
        heads = torch.arange(shape.heads, device=self.arena.device).view(shape.layers, -1)
        return torch.cat(
            [
                static_score(self.config, self.newest(layer, 0, tokens)[0], head, position)
                for layer, head in enumerate(heads)
            ]
        )
