"""A picture as plain pixels, which can be compared and hashed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .core.types import Array


@dataclass(frozen=True)
class Bitmap:
    """RGB pixels, ``height`` × ``width`` × 3 bytes row by row; equal if every pixel is."""

    data: bytes
    height: int
    width: int

    @classmethod
    def of(cls, pixels: Array) -> Bitmap:
        """From an array (height, width, 3) uint8."""
        height, width, _ = pixels.shape
        return cls(np.ascontiguousarray(pixels, np.uint8).tobytes(), height, width)

    @property
    def image(self) -> Any:
        """The same as an image of PIL, which processors of all makes take."""
        from .core.images import open_picture

        return open_picture(self.pixels)

    @property
    def pixels(self) -> Array:
        """(height, width, 3) uint8."""
        return np.frombuffer(self.data, np.uint8).reshape(self.height, self.width, 3)
