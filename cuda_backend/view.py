"""What one layer attends to: the pool's slots of its KV heads, and its newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mlx_kvret.core.types import Ints

from .pool import Pool


@dataclass(frozen=True)
class LayerView:
    """What a layer attends to: pool slots of its heads and its rectangle (R, H, r, D).

    ``hidden`` (R,) counts places at the start of the rectangle that are padding; None if there are none.
    """

    pool: Pool
    layer: int
    layers: int
    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    def flat_heads(self) -> Ints:
        """The layer's flat heads, (R·H,)."""
        first = np.arange(self.rows)[:, None] * self.layers + self.layer
        return (first * self.kv_heads + np.arange(self.kv_heads)).reshape(-1)

    def host_lengths(self) -> Ints:
        """Kept entries of each sequence and KV head (R·H,); waits for the device once after a compaction."""
        offsets, heads = self.pool.lookup.on_host(), self.flat_heads()
        return offsets[heads + 1] - offsets[heads]

    def kept(self, heads: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Kept keys and values of the flat ``heads`` (n,), padded, and which of them are real.

        Returns (n, width, Dk), (n, width, Dv) and a mask (n, width).
        """
        lookup = self.pool.lookup
        begin, end = lookup.offsets[heads], lookup.offsets[heads + 1]
        index = begin[:, None] + torch.arange(width, device=heads.device)
        real = index < end[:, None]
        slots = lookup.table[index.clamp(max=max(len(lookup.table) - 1, 0))]
        return self.pool.keys[slots], self.pool.values[slots], real

    def visible(self, tokens: int) -> torch.Tensor:
        """What the last ``tokens`` of the rectangle see of it, (R or 1, tokens, r)."""
        length, device = self.keys.shape[2], self.keys.device
        own = torch.arange(length - tokens, length, device=device)[:, None]
        place = torch.arange(length, device=device)
        causal = (place <= own)[None]
        if self.hidden is None:
            return causal
        # a padded token sees itself, for a softmax over nothing is not a number
        return causal & (place >= self.hidden[:, None, None]) | (place == own)
