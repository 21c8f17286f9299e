"""Where fetched models are kept: ``MLX_KVRET_CACHE``, or the platform's folder for caches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "MLX_KVRET_CACHE"


def home() -> Path:
    """The root of the cache; it may not exist yet."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/mlx-kvret").expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local").expanduser() / "mlx-kvret"
    # a relative path there is to be ignored, says the XDG specification
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else "~/.cache").expanduser() / "mlx-kvret"


def models() -> Path:
    """Where model folders are."""
    return home() / "models"


def downloads() -> Path:
    """Where fetched files are, whole or in part."""
    return home() / "downloads"
