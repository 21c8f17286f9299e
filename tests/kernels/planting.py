"""The calls that must notice a fault in a kernel, and how one is planted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from metal_host import KernelError, check

from mlx_kvret.mlx_backend.candidates import candidates_kernel, candidates_reference
from mlx_kvret.mlx_backend.kernels import compaction_plan, decode_attention, launch, score_select
from mlx_kvret.mlx_backend.kernels.attention import attend
from mlx_kvret.mlx_backend.kernels.launch import rows as host_rows
from mlx_kvret.mlx_backend.kernels.prefill_attention import chunk_rows, tiled, tiled_rows
from mlx_kvret.mlx_backend.pool import destinations_reference
from mlx_kvret.mlx_backend.selection import select_reference

from .cases import batch_with, pool_with, uniform, view_with
from .test_attention import TOLERANCE, exact
from .test_chunks import RAGGED, chunks_with, one_by_one, queries_for


def _rows(size, group, dtype=mx.float32, bits=None, sinks=False):
    """Two rows of a batch, ragged, one of them with an empty head."""
    view = batch_with([[590, 0, 9], [1, 320, 3]], [3, 5], size, dtype, bits)
    return (
        view,
        uniform(2, 3 * group, 1, size, dtype=dtype) * 3,
        attend,
        uniform(3 * group) if sinks else None,
    )


def _attention(view, queries, kernel, sinks):
    """The kernel's call, its twin's result and the tolerance."""
    scale = queries.shape[-1] ** -0.5
    twin = exact(queries, view, scale, True, sinks)
    return lambda: kernel(queries, view, scale, True, sinks), twin, TOLERANCE[queries.dtype]


def _chunks():
    """Chunks of rows with windows before them, on slabs in another order."""
    chunks = chunks_with(*RAGGED)
    queries = queries_for(chunks, 2)
    given = queries, chunks, 0.2, True, uniform(4)
    return lambda: tiled_rows(*given), one_by_one(*given), TOLERANCE[mx.float32]


def _chunk_rows():
    windows, new = [uniform(3, 2, 5, 32) for _ in "kv"], [uniform(2, 2, 7, 32) for _ in "kv"]
    where = [(-3, 0), (-3, 1), (0, 0), (0, 1), (0, 2), (-2, 0), (1, 0), (1, 1), (1, 2), (1, 3)]
    index = host_rows(np.array(where, np.int32))
    twin = [
        mx.concatenate([old[2, :, :2], own[0, :, :3], old[1, :, :1], own[1, :, :4]], axis=1)[None]
        for old, own in zip(windows, new, strict=True)
    ]
    return lambda: list(chunk_rows(*new, windows, index, len(where))), twin, 0.0


def _candidates(learned=True):
    pool = pool_with([[5, 0, 21, 2], [0] * 4, [1, 0, 0, 0]], 32, 32, free=2)
    pool.retention = -mx.abs(pool.retention)
    column = np.array([[3, 1, 7], [5, -1, -1]], np.int32)
    numbers = np.array([(2, 40, 950, 7, 30, 9), (0, 600, 700, 1, 0, 100)], np.int32)
    given = pool, -mx.abs(uniform(4, 9)), column, numbers, learned
    return lambda: candidates_kernel(*given), candidates_reference(*given), 1e-5


def _selection():
    """Three rows of two groups of other budgets, ages and floors; ties of the first digits and of all."""
    rng, size = np.random.default_rng(1), (6, 300)
    score = mx.array((rng.integers(0, 30, size) / 64 - 0.2).astype(np.float32))
    position = np.stack([rng.permutation(300) for _ in range(6)]).astype(np.int32)
    head = rng.integers(0, 9, size) % 7
    arrays = score, mx.array(rng.random(size) < 0.1), mx.array(position), mx.array(head.astype(np.int32))
    wanted, seen = np.array([40, 50, 9, 150, 3, 100]), np.array([300, 300, 900, 900, 70_000, 70_000])
    lowest = np.array([-np.inf, -np.inf, -0.1, 0.1, -np.inf, 0.0])
    twin = mx.concatenate(
        [
            select_reference(
                *(a[g : g + 1] for a in arrays), int(wanted[g]), int(seen[g]), 6, float(lowest[g])
            )
            for g in range(6)
        ]
    )
    return lambda: score_select.select(*arrays, wanted, seen, 6, lowest), twin, 0.0


def _holes():
    # more that stay than holes
    keep = mx.random.bernoulli(0.95, (3, 3000))
    base = np.array([7000, 0, 14_000], np.int32)
    twin = destinations_reference(keep, base, 2500)
    return lambda: compaction_plan.destinations(keep, base, 2500), twin, 0.0


def _counts():
    owner = mx.random.randint(0, 6, (3, 9000)).astype(mx.int32)
    twin = mx.stack([mx.zeros((6,), mx.int32).at[row].add(1) for row in owner])
    return lambda: score_select.head_counts(owner, 5), twin, 0.0


def _drafts(size, bits=None):
    view = view_with([21, 0, 190], 7, size, size, bits=bits)
    return view, uniform(1, 6, 3, size) * 3, attend, None


def _chunk(size, bits, sinks=False):
    view = view_with([21, 0, 6], 13, size, size, bits=bits)
    return view, uniform(1, 6, 11, size) * 3, tiled, uniform(6) if sinks else None


# bytes: a simdgroup takes more entries of a piece than one step has, unless a call says otherwise
PIECE, PIECES = 40_000, {"pieces": 2048, "one piece": 10**9}
CALLS: dict[str, Callable] = {
    "rows": lambda: _rows(64, 2),
    "pieces": lambda: _rows(64, 2),
    "one piece": lambda: _rows(128, 8),
    "sinks": lambda: _rows(32, 2, sinks=True),
    "k8v4": lambda: _rows(64, 2, bits="k8v4"),
    "nibbles": lambda: _rows(96, 2, bits=4),
    "words": lambda: _rows(128, 2, bits=8),
    "half words": lambda: _rows(128, 8, mx.float16, bits="k8v4"),
    "large": lambda: _rows(128, 8),
    "drafts": lambda: _drafts(32),
    "chunk": lambda: _chunk(32, "k8v4"),
    "chunk of floats": lambda: _chunk(96, None, sinks=True),
}
# calls, what they should give, and how near
CALLS = {name: lambda made=made: _attention(*made()) for name, made in CALLS.items()}
CALLS |= {
    "chunks": _chunks,
    "chunk rows": _chunk_rows,
    "candidates": _candidates,
    "selection": _selection,
    "holes": _holes,
    "counts": _counts,
}


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in a source, at its ``nth`` place; ``call`` notices in one of the passes."""

    file: str
    fault: str
    old: str
    new: str
    call: str
    found_by: str = "run"
    nth: int = 0

    def apply(self, source: str) -> str:
        parts = source.split(self.old)
        assert len(parts) > self.nth + 1, f"{self.file} does not contain {self.old!r}"
        return self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])

    def __str__(self) -> str:
        return f"{self.file}: {self.fault}"

    def noticed(self) -> bool:
        """Whether the call fails."""
        mx.random.seed(0)
        call, twin, tolerance = CALLS[self.call]()
        with self._planted():
            try:
                check(call, lambda: twin, tolerance, (self.found_by,))
            except KernelError:
                return True
        return False

    @contextmanager
    def _planted(self) -> Iterator[None]:
        stock, piece = launch._source, PIECES.get(self.call, PIECE)

        def source(file: str) -> str:
            text: str = stock(file)
            return self.apply(text) if file == f"{self.file}.metal" else text

        with (
            patch.object(launch, "_source", source),
            patch.multiple(decode_attention, PIECE_BYTES=piece, SMALL_PIECE=piece),
        ):
            yield
