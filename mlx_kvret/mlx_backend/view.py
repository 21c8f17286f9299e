"""What one layer attends to: the pool's slots of its KV heads, and its newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.types import Ints
from .pool import Pool


@dataclass(frozen=True)
class LayerView:
    """What a layer attends to: pool slots of its heads and its rectangle (1, H, r, D)."""

    pool: Pool
    layer: int
    keys: mx.array
    values: mx.array

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def first(self) -> int:
        return self.layer * self.kv_heads

    def host_lengths(self) -> Ints:
        """Kept entries of each KV head (H,); waits for the device once after a compaction."""
        return np.diff(self.pool.lookup.on_host()[self.first : self.first + self.kv_heads + 1])

    def kept(self, first: int, count: int, width: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """Kept keys and values of ``count`` heads from ``first`` on, padded, and which of them are real.

        Returns (count, width, Dk), (count, width, Dv) and a mask (count, width), None if all are real.
        """
        slots, real = self.pool.lookup.padded(self.first + first, count, width)
        return self.pool.keys[slots], self.pool.values[slots], real
