"""How much of each part of a text a cache has kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .types import Ints

SIXTEENTHS = 16


@dataclass(frozen=True)
class Part:
    """Positions ``start`` to ``end`` - 1 of a text, and the share of their entries that is kept (0 to 1)."""

    start: int
    end: int
    share: float


def kept_by_part(position: Ints, heads: int, seen: int, parts: int = SIXTEENTHS) -> list[Part]:
    """The kept share of each part of a text, first to last.

    Args:
        position: of each kept entry, (N,), 0-based.
        heads: entries of a full cache per token, L·H.
        seen: tokens of the text.
        parts: how many of equal length; fewer where the text has fewer tokens.
    """
    edges = np.linspace(0, seen, min(parts, seen) + 1).astype(np.int64)
    if not seen:
        return []
    counts, _ = np.histogram(np.asarray(position), edges)
    return [
        Part(int(a), int(b), int(count) / (int(b - a) * heads))
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
