"""Folders that lie beside the package in a checkout, and inside of it where it is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Same(MetaPathFinder, Loader):
    """Imports ``folder.module`` as the very ``mlx_kvret.folder.module``."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith(f"{self._folder}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"mlx_kvret.{spec.name}")
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # it was run under its own name, which it keeps
        module.__spec__ = self._own


def known_as(folder: str) -> None:
    """Have ``import folder`` give the package's own ``mlx_kvret.folder``, so that nothing is there twice."""
    sys.meta_path.insert(0, _Same(folder))
    sys.modules[folder] = importlib.import_module(f"mlx_kvret.{folder}")
