"""Ranks as threads of this process, which sum through a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mlx_kvret.core.ranks import Ranks


class Table:
    """What the threads lay their arrays on."""

    def __init__(self, size: int) -> None:
        self.barrier, self.parts = threading.Barrier(size, timeout=20), [np.zeros(0)] * size


class Thread(Ranks):
    def __init__(self, rank: int, table: Table) -> None:
        super().__init__(rank, len(table.parts))
        self.table = table

    def token(self, token: Any) -> Any:
        return self.first(np.asarray(token))

    def _sum(self, counts: Any) -> Any:
        return np.sum(self._gather(counts), axis=0, dtype=np.int32)

    def _gather(self, array: Any) -> list[Any]:
        self.table.parts[self.rank] = array
        self.table.barrier.wait()
        found = list(self.table.parts)
        self.table.barrier.wait()
        return found


def together(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each of ``size`` ranks returns."""
    table = Table(size)

    def one(rank: int) -> Any:
        try:
            return work(Thread(rank, table))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
