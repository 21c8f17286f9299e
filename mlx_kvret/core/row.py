"""What every backend's row of an arena is made of and counts alike."""

from __future__ import annotations

from typing import Any

from .advice import tell_reach
from .config import EvictionConfig
from .eviction import heads_per_group
from .pictures import Pictures
from .schedule import Schedule
from .slabs import Hold


class BaseRow:
    """A sequence of an ``arena`` that has ``seen`` so many tokens, the last ``length`` not in the pool yet.

    ``config`` has its own budget, ``hold`` its slab; ``pictures`` stand among the tokens seen.
    """

    def __init__(self, arena: Any, config: EvictionConfig, hold: Hold) -> None:
        self.arena, self.config, self.hold = arena, config, hold
        # of all ranks' groups, so that all decide the same at the same time
        size = heads_per_group(config, arena.whole.layers, arena.whole.kv_heads)
        self.schedule = Schedule(config, arena.whole.heads // size, size)
        self.seen = self.length = 0
        self.pictures: Pictures = ()

    @property
    def entries(self) -> int:
        """Cached entries over all layers, heads and ranks, before anything that is due is carried out."""
        return self._kept + self._newest

    @property
    def counted(self) -> int:
        """Bytes of these entries by arithmetic, over all ranks too."""
        return int(self.arena.whole.counted(self._kept, self._newest, self.config.kv_bits))

    def tell_reach(self, coming: int) -> None:
        """Warn where the tokens that come go beyond what the model was made for."""
        tell_reach(self.arena.owner.get("model", ""), self.arena.reach, self.seen, self.seen + coming)

    @property
    def _kept(self) -> int:
        return int(self.schedule.counts.sum())

    @property
    def _newest(self) -> int:
        return int(self.length * self.arena.whole.heads)
