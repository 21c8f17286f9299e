"""What a cache has read, as texts that stay beside it for as long as it reads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def note(cache: Any, notes: Mapping[str, str]) -> None:
    """Put texts beside a cache, as it is now."""
    vars(cache)["noted"] = cache.seen, dict(notes)


def notes_of(cache: Any) -> dict[str, str]:
    """The texts beside a cache; none if it has gone on since, or is a row of mlx-lm's, a plain list."""
    seen, notes = getattr(cache, "noted", (0, {}))
    return dict(notes) if notes and cache.seen == seen else {}
