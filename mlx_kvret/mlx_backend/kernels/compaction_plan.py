"""Where survivors go; the twin is :meth:`mlx_kvret.mlx_backend.pool.Pool.destinations_reference`.

Only the plan is a kernel. The moves are MLX's scatter updates, which write into the pool itself as long as no
one else holds it: see ``tests/kernels/test_in_place.py``.
"""

from __future__ import annotations

import mlx.core as mx

from .launch import Kernel

_fill = Kernel("hole_filling", ["keep", "survives"], ["holes", "slots"])


def destinations(keep: mx.array, survives: mx.array) -> mx.array:
    """Slots (groups, N) int32 for newcomers that ``survives`` marks, in the holes of ``keep`` (groups, C)."""
    groups, slots = keep.shape
    # more than 512 threads are not for every device
    simdgroups = 16 if slots > 8192 else 8
    _, places = _fill(
        [keep, survives],
        [(keep.shape, mx.int32), (survives.shape, mx.int32)],
        (groups, 1, 1),
        simdgroups * 32,
        S=simdgroups,
    )
    return places
