"""One process, or several started by ``accelerate launch`` that share the rows of every batch."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import torch

from mlx_kvret.errors import MissingDependencyError

from .base import choose_device


class Processes(Protocol):
    """``index`` of ``count`` processes, each with its device."""

    index: int
    count: int
    device: torch.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, the same in all of them."""


class Single:
    """This process alone."""

    index, count = 0, 1

    def __init__(self, device: str):
        self.device = choose_device(device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Several:
    """The processes of an ``accelerate launch``."""

    def __init__(self, device: str):
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise MissingDependencyError(
                "more than one process needs accelerate; run `pip install 'mlx-kvret[train]'`"
            ) from error
        self._accelerator = Accelerator(cpu=choose_device(device).type == "cpu")
        self.index, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._accelerator.reduce(tensor, reduction="sum")


def join(device: str) -> Processes:
    """What this process was started as."""
    return Several(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Single(device)


def my_rows(rows: int, processes: Processes) -> list[int]:
    """The rows of a batch that this process works on."""
    return np.array_split(np.arange(rows), processes.count)[processes.index].tolist()
