"""What a loaded model's RoPE modules do, measured; and one that does what it is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.rope import Rotation
from ..core.types import Array

_ROTARY = re.compile("rope|rotary", re.IGNORECASE)
# near ones tell high frequencies, far ones low frequencies and whether they depend on the length
_OFFSETS = (0, 1, 61, 4_099, 1_000_003)


class FixedRoPE(nn.Module):
    """Rotates the first numbers of each head (..., T, D) as a :class:`Rotation` says.

    ``traditional`` pairs neighbours (2i, 2i + 1) instead of (i, i + dims / 2), as in ``nn.RoPE``.
    """

    def __init__(self, rotation: Rotation, traditional: bool) -> None:
        super().__init__()
        self.dims, self.scale, self.traditional = rotation.dims, rotation.scale, traditional
        with np.errstate(divide="ignore"):
            self._freqs = mx.array((1 / rotation.frequencies).astype(np.float32))

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if self.scale != 1:
            x = x.at[..., : self.dims].multiply(self.scale)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )

    def _extra_repr(self) -> str:
        return f"{self.dims}, traditional={self.traditional}, scale={self.scale:g}"


def rotary_modules(attention: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """An attention's own modules that rotate queries and keys, by name."""
    for name, child in attention.children().items():
        if (
            isinstance(child, nn.Module)
            and callable(child)
            and _ROTARY.search(f"{name} {type(child).__name__}")
        ):
            yield name, child


def is_traditional(module: nn.Module) -> bool:
    """Whether a RoPE module pairs neighbours."""
    return bool(getattr(module, "traditional", False))


def dims_of(module: nn.Module) -> int | None:
    """How many numbers a RoPE module rotates, if it says so."""
    found = getattr(module, "dims", None) or getattr(module, "dim", None)
    return found if isinstance(found, int) else None


def applies(module: Any, rotation: Rotation, width: int) -> bool:
    """Whether a module does to heads of ``width`` numbers what a rotation says, at near and far positions.

    Each unit vector is one head, so what comes back are the columns of the module's matrix.
    """
    width = max(width, rotation.dims)
    # two tokens: the second one stands a position further
    units = mx.broadcast_to(mx.eye(width)[None, :, None], (1, width, 2, width))
    pairs = np.arange(rotation.dims // 2)
    paired = (2 * pairs, 2 * pairs + 1) if is_traditional(module) else (pairs, pairs + rotation.dims // 2)
    for offset in _OFFSETS:
        try:
            found = np.array(module(units, offset=offset).astype(mx.float32))[0]
        except (TypeError, ValueError, AttributeError, IndexError):
            return False
        if found.shape != units.shape[1:]:
            return False
        for step in range(2):
            wanted, allowed = _matrix(rotation, offset + step, width, paired)
            if not np.all(np.abs(found[:, step] - wanted) <= allowed):
                return False
    return True


def _matrix(
    rotation: Rotation, position: int, width: int, paired: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Rows are the images of the unit vectors (width, width), and what float32 may make of each."""
    first, second = paired
    angle = position * rotation.frequencies
    cos, sin = rotation.scale * np.cos(angle), rotation.scale * np.sin(angle)
    wanted, allowed = np.eye(width), np.full((width, width), 1e-5)
    wanted[first, first], wanted[second, second] = cos, cos
    wanted[first, second], wanted[second, first] = sin, -sin
    # an angle has the relative rounding of its frequency
    error = rotation.scale * (2e-5 + 2e-6 * angle)
    for rows in paired:
        for columns in paired:
            allowed[rows, columns] = error
    return wanted, allowed
