"""One process, or several started by ``accelerate launch`` that share the rows of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import distributed

from mlx_kvret.errors import MissingDependencyError
from mlx_kvret.training.packing import Batch

from ..ranks import TorchRanks, connected
from .base import choose_device

T = TypeVar("T")


class Processes(Protocol):
    """``index`` of ``count`` processes, each with its device."""

    index: int
    count: int
    device: torch.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, the same in all of them."""

    def agreed(self, make: Callable[[], T]) -> T:
        """What this process makes; if one refuses, all do.

        Raises:
            RankError: another process refuses. This one's own error is raised as it is.
        """


class Single:
    """This process alone."""

    index, count = 0, 1

    def __init__(self, device: str):
        self.device = choose_device(device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def agreed(self, make: Callable[[], T]) -> T:
        return make()


class Several:
    """The processes of an ``accelerate launch``."""

    def __init__(self, device: str):
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingDependencyError(
                "more than one process needs accelerate; run `pip install 'mlx-kvret[train]'`"
            ) from error
        state = PartialState(cpu=choose_device(device).type == "cpu")
        self.index, self.count = int(state.process_index), int(state.num_processes)
        self.device: torch.device = state.device
        world = distributed.group.WORLD
        assert world is not None  # since accelerate has begun it
        self._ranks = TorchRanks(world, self.device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        with connected():
            distributed.all_reduce(total)
        return total

    def agreed(self, make: Callable[[], T]) -> T:
        made: list[T] = []
        self._ranks.agreed(lambda: made.append(make()))
        return made[0]


def join(device: str) -> Processes:
    """What this process was started as."""
    return Several(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Single(device)


def my_rows(rows: int, processes: Processes) -> list[int]:
    """The rows of a batch that this process works on."""
    return np.array_split(np.arange(rows), processes.count)[processes.index].tolist()


def rounds(
    batch: Batch, processes: Processes, micro_batch: int, sharded: bool
) -> Iterator[tuple[Batch, list[int]]]:
    """The micro-batches of this process: batches and rows in them.

    ``sharded`` processes make equally many, over two tokens that teach nothing where there is no work.
    """
    rows = my_rows(len(batch.ids), processes)
    parts = [rows[first : first + micro_batch] for first in range(0, len(rows), micro_batch)]
    full = [part for part in parts if (batch.position[part] >= 0).any()]
    yield from ((batch, part) for part in full)
    if sharded:
        most = -(-len(batch.ids) // processes.count)
        idle = Batch(
            batch.ids[:1, :2], np.zeros((1, 2), np.int64), np.full((1, 2), -1), np.zeros((1, 2), bool)
        )
        for _ in range(-(-most // micro_batch) - len(full)):
            yield idle, [0]
