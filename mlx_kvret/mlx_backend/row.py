"""One sequence of an arena: its slab, its clock, its budget, and what is known of its newest tokens."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx

from ..core.config import EvictionConfig
from ..core.pictures import forgotten
from ..core.row import BaseRow
from ..core.schedule import Move
from ..core.slabs import Hold
from .arena import Arena
from .observed import Piece, shortened
from .recent import Pair, Recent


class Row(BaseRow):
    """A sequence that has ``seen`` so many tokens, of which the newest ``length`` are not in the pool yet.

    Those stand in the arena's recent windows, or in ``wide`` (each layer's keys and values (1, H, length or
    more, D)) after a chunk that has no room there. ``pieces`` tell where their log β are, ``taken_back`` how
    many tokens each layer has been asked to forget. ``pictures`` stand among the tokens seen; ``prompt`` is
    what is known of the one that brought the last of them. Attributes get new values and are never changed in
    place.
    """

    def __init__(self, arena: Arena, config: EvictionConfig, hold: Hold) -> None:
        super().__init__(arena, config, hold)
        self.wide: list[Pair] | None = None
        self.pieces: list[Piece] = []
        self.taken_back = [0] * arena.shape.layers
        self.prompt: Any = None
        arena.rows.add(self)

    @property
    def slab(self) -> int:
        return self.hold.index

    def next(self) -> Move | None:
        """What is due of it, or None."""
        return self.schedule.next(self.seen, self.length)

    def window(self, layer: int, recent: Recent | None = None) -> Pair:
        """A layer's newest tokens, keys and values (1, H, length, D)."""
        if self.wide is None:
            return (recent or self.arena.recent).window(layer, self.slab, self.length)
        keys, values = self.wide[layer]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def forgetting(self, count: int) -> dict[str, Any]:
        """Its values without its newest ``count`` tokens."""
        pieces = shortened(self.pieces, newest=count) if self.pieces else []
        return {
            "seen": self.seen - count,
            "length": self.length - count,
            "pieces": pieces,
            "taken_back": [0] * len(self.taken_back),
            "pictures": forgotten(self.pictures, self.seen - count),
        }

    def at(self, arena: Arena, hold: Hold) -> Row:
        """The same sequence in another arena, or on another hold; what it holds there is not its care."""
        twin = copy.copy(self)
        twin.arena, twin.hold, twin.schedule = arena, hold, copy.copy(self.schedule)
        arena.rows.add(twin)
        return twin

    def twin(self) -> Row:
        """The same sequence, which shares its slab until either is written to."""
        return self.at(self.arena, self.arena.slabs.share(self.hold))

    def arrays(self) -> list[mx.array]:
        """What it holds beside the arena's arrays."""
        return [array for pair in self.wide or () for array in pair]

    def __deepcopy__(self, memo: dict[int, Any]) -> Row:
        raise TypeError("a row is copied with the cache it belongs to")
