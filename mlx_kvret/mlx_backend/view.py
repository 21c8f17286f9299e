"""What one layer attends to: the pool's slots of its KV heads, and its newest tokens, of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.types import Ints
from .pool import Pool


def placed(rows: list[tuple[int, int, int]]) -> mx.array:
    """Each row's slab, its place among the windows, and its tokens there: (at least 3, 3) int32 for kernels.

    MLX hands arrays of fewer than 8 numbers over in another way, for which it builds a kernel anew; so a
    batch of one row has as many as others.
    """
    return mx.array(rows + [(0, 0, 0)] * (3 - len(rows)), mx.int32)


@dataclass(frozen=True)
class Chunk:
    """Where a row of a :class:`ChunkView` stands: of its ``end`` newest tokens the last ``tokens`` ask.

    ``index`` is its place among the queries, ``begin`` that of its first token among all rows' tokens.
    """

    index: int
    slab: int
    begin: int
    end: int
    tokens: int


@dataclass(frozen=True)
class ChunkView:
    """Chunks of several rows in a layer: ``keys`` and ``values`` (1, H, n, D), one row after another."""

    pool: Pool
    layer: int
    keys: mx.array
    values: mx.array
    rows: tuple[Chunk, ...]

    def pair(self, row: Chunk) -> tuple[mx.array, mx.array]:
        """A row's newest tokens (1, H, end, D)."""
        own = slice(row.begin, row.begin + row.end)
        return self.keys[:, :, own], self.values[:, :, own]

    def view(self, row: Chunk) -> LayerView:
        """What a row attends to."""
        return LayerView(self.pool, self.layer, *self.pair(row), (row.slab,))


@dataclass(frozen=True)
class LayerView:
    """Rows of ``slabs`` of the pool, and their newest tokens (R, H, r, D).

    Rows with fewer than r have ``lengths`` (R,) of them, and ``bias`` (R, 1, 1, r) is -inf where there is
    nothing; both are None where all have r. Kernels read a batch's tokens where they stand: ``windows`` are
    those of all slabs, (slabs, H, ≥ r, D), and ``batch`` says where each row is, as :func:`placed`.
    """

    pool: Pool
    layer: int
    keys: mx.array
    values: mx.array
    slabs: tuple[int, ...] = (0,)
    lengths: tuple[int, ...] | None = None
    bias: mx.array | None = None
    windows: tuple[mx.array, mx.array] | None = None
    batch: mx.array | None = None

    def where(self) -> tuple[mx.array, mx.array, mx.array]:
        """Windows' keys and values, and ``batch``, worked out if it was not given."""
        if self.windows is not None and self.batch is not None:
            return *self.windows, self.batch
        lengths = self.lengths or (self.keys.shape[2],) * len(self.slabs)
        rows = [(slab, row, n) for row, (slab, n) in enumerate(zip(self.slabs, lengths, strict=True))]
        return self.keys, self.values, placed(rows)

    @property
    def pair(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head(self) -> int:
        """The layer's first flat head."""
        return self.layer * self.kv_heads

    @property
    def first(self) -> int:
        """Where the only row's heads begin in the offsets."""
        return self.slabs[0] * (self.pool.heads + 1) + self.head

    def rows(self) -> Iterator[LayerView]:
        """The rows one by one."""
        for row, slab in enumerate(self.slabs):
            length = self.keys.shape[2] if self.lengths is None else self.lengths[row]
            keys, values = (a[row : row + 1, :, :length] for a in (self.keys, self.values))
            yield LayerView(self.pool, self.layer, keys, values, (slab,))

    def host_offsets(self) -> Ints:
        """Where the only row's heads (H + 1,) begin and end; waits for the device once after a compaction."""
        return self.pool.lookup.on_host(self.slabs[0])[self.head : self.head + self.kv_heads + 1]

    def host_lengths(self) -> Ints:
        """Kept entries of each KV head (H,) of the only row; waits as :meth:`host_offsets`."""
        return np.diff(self.host_offsets())

    def kept(self, first: int, count: int, width: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """Kept keys and values of ``count`` heads from ``first`` on, padded, and which of them are real.

        Returns (count, width, Dk), (count, width, Dv) and a mask (count, width), None if all are real.
        """
        slots, real = self.pool.lookup.padded(self.head + first, count, width, self.slabs[0])
        return self.pool.keys_at(slots), self.pool.values_at(slots), real
