"""What is installed here, found out without importing it, and the command that installs what is not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from pathlib import Path

APPLE_SILICON = sys.platform == "darwin" and platform.machine() == "arm64"
# packages that a backend imports; the extra of the same name installs them
PACKAGES = {"mlx": ("mlx", "mlx_lm"), "cuda": ("torch", "transformers"), "torch": ("torch", "transformers")}
# packages beside those of a backend, under the names of their extras
BESIDE = {"vlm": ("mlx_vlm", "PIL"), "pictures": ("PIL",)}
# of NVIDIA's driver, on Linux and in WSL, and of AMD's
DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/nvidia-smi", "/dev/kfd")


def missing(backend: str) -> list[str]:
    """Packages of a backend, or beside one, that are not installed."""
    return [package for package in (PACKAGES | BESIDE)[backend] if not _there(package)]


def installed(backend: str) -> bool:
    """Whether all that a backend imports is installed."""
    return not missing(backend)


def command_for(backend: str) -> str:
    """The command that installs what a backend imports."""
    return f"pip install 'mlx-kvret[{backend}]'"


def driver_there() -> bool:
    """Whether there is a driver for GPUs that torch may use; if not, torch is not asked, which takes long."""
    return any(Path(path).exists() for path in DRIVERS) or shutil.which("nvidia-smi") is not None


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # finders that refuse, and modules put in place by hand
        return False
