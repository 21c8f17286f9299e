"""The newest tokens of all sequences, whose fate is not decided yet: a window per slab and layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlx_kvret.core.budget import CacheShape

from .pool import resized

STEP = 256
ARRAYS = ("keys", "values", "inputs", "log_beta")


class Recent:
    """Windows of S slabs: ``keys`` (L, S, H, room, Dk) and ``values`` (L, S, H, room, Dv), None until needed.

    Gates are deferred: their ``inputs`` (L, S, g, hidden) wait until g tokens have come, then one call serves
    all layers and rows, so that a decoded token does not pay for reading the gates' weights. ``log_beta``
    (L, S, H, room) float32 is what they said.

    How much of a window is in use is known to its row. It is written beyond that only, but for compactions,
    so that a pass that is broken off has changed nothing.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    inputs: torch.Tensor | None
    log_beta: torch.Tensor | None

    def __init__(self, shape: CacheShape, slabs: int, defer: int, device: torch.device) -> None:
        self._shape, self._slabs, self._defer, self._device = shape, slabs, defer, device
        vars(self).update(dict.fromkeys(ARRAYS))

    def reserve(self, end: int, most: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for ``end`` tokens like ``keys`` and ``values`` (R, H, ·, D), in steps up to ``most``."""
        if self.keys is None or self.values is None or self.keys.shape[3] < end:
            room = max(end, min(most, -(-end // STEP) * STEP))
            made = self._wide(self.keys, room, keys.dtype, keys.shape[-1])
            vars(self).update(values=self._wide(self.values, room, values.dtype, values.shape[-1]), keys=made)

    def reserve_scores(self, end: int, most: int) -> torch.Tensor:
        """``log_beta`` with room for ``end`` tokens."""
        if self.log_beta is None or self.log_beta.shape[3] < end:
            room = max(end, min(most, -(-end // STEP) * STEP))
            old = None if self.log_beta is None else self.log_beta[..., None]
            self.log_beta = self._wide(old, room, torch.float32, 1)[..., 0]
        return self.log_beta

    def reserve_inputs(self, dtype: torch.dtype) -> torch.Tensor:
        """``inputs``, made where there are none."""
        if self.inputs is None:
            size = (self._shape.layers, self._slabs, self._defer, self._shape.hidden_size)
            self.inputs = torch.zeros(size, dtype=dtype, device=self._device)
        return self.inputs

    def _wide(self, old: torch.Tensor | None, room: int, dtype: torch.dtype, width: int) -> torch.Tensor:
        size = (self._shape.layers, self._slabs, self._shape.kv_heads, room, width)
        wide = torch.zeros(size, dtype=dtype, device=self._device)
        if old is not None:
            wide[:, :, :, : old.shape[3]] = old
        return wide

    def slices(self, layer: int, slab: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (1, H, end - start, D) of one window, to be read and written."""
        assert self.keys is not None and self.values is not None
        place = (layer, slice(slab, slab + 1), slice(None), slice(start, end))
        return self.keys[place], self.values[place]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (S, H, room, D) of all windows of a layer."""
        assert self.keys is not None and self.values is not None
        return self.keys[layer], self.values[layer]

    def copy_slab(self, source: int, target: int) -> None:
        """Have slab ``target`` hold what ``source`` holds."""
        for array in self.arrays():
            array[:, target] = array[:, source]

    def clear(self, slab: int) -> None:
        """Forget what somebody else has left, which may not be numbers; masked it would still be read."""
        for array in self.arrays():
            array[:, slab].zero_()

    def resized(self, count: int, sources: Sequence[int]) -> dict[str, Any]:
        """The attributes with ``count`` slabs, of which the first ones are those of ``sources``."""
        held = {name: getattr(self, name) for name in ARRAYS}
        made = {n: None if a is None else resized(a, 1, count, sources) for n, a in held.items()}
        return made | {"_slabs": count}

    def arrays(self) -> list[torch.Tensor]:
        """Everything that a step reads or writes."""
        return [array for name in ARRAYS if (array := getattr(self, name)) is not None]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())
