"""What launches cost, counted access by access."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .launch import Launch


@dataclass(frozen=True)
class BufferTraffic:
    """Bytes of one device buffer.

    loaded, stored: every access of every thread. *_per_threadgroup: each byte once per threadgroup that
    touches it, which is what a threadgroup has to fetch. *_distinct: each byte once per launch.
    """

    name: str
    size: int
    loaded: int
    stored: int
    loaded_per_threadgroup: int
    stored_per_threadgroup: int
    loaded_distinct: int
    stored_distinct: int


@dataclass(frozen=True)
class LaunchTraffic:
    """One dispatch. loaded_by_threadgroup: bytes, (threadgroups, buffers) in the order of `buffers`."""

    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    buffers: tuple[BufferTraffic, ...]
    barriers: int
    simdgroup_barriers: int
    simdgroup_ops: int
    threadgroup_memory: int
    loaded_by_threadgroup: np.ndarray

    def work(self, *names: str) -> np.ndarray:
        """Bytes that each threadgroup loads from the named buffers (default: all), in order of execution."""
        columns = [i for i, b in enumerate(self.buffers) if not names or b.name in names]
        return self.loaded_by_threadgroup[:, columns].sum(axis=1)


@dataclass(frozen=True)
class Traffic:
    """All launches of a call, in order."""

    launches: tuple[LaunchTraffic, ...]

    @classmethod
    def of(cls, jobs: Sequence[Launch]) -> "Traffic":
        return cls(tuple(_launch(job) for job in jobs))

    def of_kernel(self, part_of_name: str) -> "Traffic":
        """Only launches whose kernel's name contains this."""
        return Traffic(tuple(x for x in self.launches if part_of_name in x.kernel))

    def total(self, count: str, *buffers: str) -> int:
        """Sum of one of BufferTraffic's counts over the named buffers (default: all), over all launches."""
        chosen = (b for launch in self.launches for b in launch.buffers if not buffers or b.name in buffers)
        return sum(getattr(b, count) for b in chosen)

    @property
    def barriers(self) -> int:
        return sum(x.barriers for x in self.launches)

    @property
    def simdgroup_ops(self) -> int:
        return sum(x.simdgroup_ops for x in self.launches)

    @property
    def threadgroup_memory(self) -> int:
        """The most bytes a threadgroup of any launch used."""
        return max((x.threadgroup_memory for x in self.launches), default=0)


def _launch(job: Launch) -> LaunchTraffic:
    buffers = (
        BufferTraffic(m.name, m.span, *(getattr(c, field) for field in c.COUNTS))
        for m, c in zip(job.memory, job.counts, strict=True)
    )
    r = job.result
    costs = (r.barriers, r.simdgroup_barriers, r.simdgroup_ops, r.threadgroup_memory)
    assert job.loaded_by_threadgroup is not None
    return LaunchTraffic(
        job.build.kernel.name, job.grid, job.threadgroup, tuple(buffers), *costs, job.loaded_by_threadgroup
    )
