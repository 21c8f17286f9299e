"""What competes in a compaction, and where what stays of it goes, of all rows in one launch each.

The twins are in :mod:`..candidates` and :meth:`mlx_kvret.mlx_backend.pool.Pool.destinations_reference`. Only
the plan is a kernel. The moves are MLX's scatter updates, which write into the pool itself as long as no one
else holds it: see ``tests/kernels/test_in_place.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ...core.types import Ints
from .launch import Kernel, constant, rows
from .score_select import BLOCK, SIMDGROUPS

_candidates = Kernel(
    "candidates",
    ["pool_retention", "pool_position", "pool_owner", "newest", "column", "numbers", "room"],
    ["score", "retention", "position", "head", "must"],
    header="scoring.metal",
)
_fill = Kernel("hole_filling", ["keep", "base", "room"], ["holes", "slots"])
OUTPUTS = (mx.float32, mx.float32, mx.int32, mx.int32, mx.bool_)


def candidates(
    accounts: Sequence[mx.array],
    sizes: tuple[int, int, int],
    newest: mx.array,
    column: Ints,
    numbers: Ints,
    learned: bool,
) -> list[mx.array]:
    """As :func:`..candidates.candidates_reference`.

    ``accounts`` are the pool's retention, position and owner; ``sizes`` its groups, the heads of a group and
    a group's slots.
    """
    groups, size, slots = sizes
    shape = len(numbers) * groups, slots + size * column.shape[1]
    return _candidates(
        [
            *(*accounts, newest),
            *(rows(column), rows(numbers), constant(slots)),
        ],
        [(shape, dtype) for dtype in OUTPUTS],
        (-(-shape[1] // BLOCK), shape[0], 1),
        SIMDGROUPS * 32,
        GROUPS=groups,
        SIZE=size,
        S=SIMDGROUPS,
        BLOCK=BLOCK,
        LEARNED=learned,
    )


def destinations(keep: mx.array, base: Ints, slots: int) -> mx.array:
    """Slots (groups, N) int32 for newcomers that ``keep`` (groups, C + N) marks, in the holes among C slots.

    C = ``slots``; a group's first one is ``base`` (groups,).
    """
    groups, newcomers = len(keep), keep.shape[1] - slots
    # more than 512 threads are not for every device
    simdgroups = 16 if slots > 8192 else 8
    _, places = _fill(
        [keep, rows(base), constant(slots)],
        [((groups, slots), mx.int32), ((groups, newcomers), mx.int32)],
        (groups, 1, 1),
        simdgroups * 32,
        S=simdgroups,
    )
    return places
