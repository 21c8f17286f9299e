"""What kind of cache a stock entry is: mlx-lm and mlx-vlm have classes of their own under the same names."""

from __future__ import annotations

from typing import Any

_MODULES = ("mlx_lm.models.cache", "mlx_vlm.models.cache")


def kind(entry: Any) -> str:
    """The name of a stock entry's class, ``"KVCache"``; nothing for a class of anybody else's."""
    cls = entry if isinstance(entry, type) else type(entry)
    return cls.__name__ if cls.__module__ in _MODULES else ""


def is_kind(entry: Any, name: str) -> bool:
    """Whether an entry is of exactly this class of either package."""
    return kind(entry) == name
