"""A fast BLAS for MLX on Linux, whose wheel brings the reference one: OpenBLAS, where it is installed."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# Debian and Ubuntu, Fedora, Arch
PLACES = ("/usr/lib/*-linux-gnu/openblas-*/libopenblas.so.0", "/usr/lib*/libopenblas*.so.0")
HINT = (
    "MLX multiplies matrices with the reference BLAS here, many times slower than OpenBLAS; "
    "install that (Debian, Ubuntu: sudo apt-get install libopenblas0-pthread) and it is used"
)


def prefer_openblas() -> bool:
    """Have MLX find OpenBLAS's functions before its own.

    Symbols of a library that was loaded for everyone are found first. Returns whether there is nothing to be
    wished for: OpenBLAS is loaded, or the system is none where MLX lacks a fast BLAS.
    """
    if not sys.platform.startswith("linux"):
        return True
    if "blas" in os.environ.get("LD_PRELOAD", ""):
        return True
    for name in ("libopenblas.so.0", *found()):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def found() -> list[str]:
    """Where OpenBLAS lies that is not on the loader's path."""
    return [str(path) for place in PLACES for path in sorted(Path("/").glob(place.lstrip("/")))]
