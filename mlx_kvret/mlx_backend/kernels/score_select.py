"""Radix selection of what stays; the twin is :func:`mlx_kvret.mlx_backend.selection.select_reference`.

The last candidate to stay is found digit by digit (12, 11 and 11 bits of a rank of 34), so the scores are
read four times: three histograms and one verdict. Ties are then decided among the verdicts.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ...core.types import Floats, Ints
from .launch import Kernel, rows

SIMDGROUPS = 8
BLOCK = 8192  # candidates per threadgroup
DIGITS = ((22, 12), (11, 11), (0, 11))  # shift and bits
MAX_HEADS = 8191  # whose counts fill a threadgroup's memory

CANDIDATES = ["score", "must", "head"]
_histogram = Kernel(
    "rank_histogram", [*CANDIDATES, "state", "numbers"], ["histogram"], header="ranking.metal", atomic=True
)
_digit = Kernel("rank_digit", ["histogram", "state"], ["next"])
_verdict = Kernel(
    "rank_verdict", [*CANDIDATES, "state", "numbers", "lowest"], ["verdict"], header="ranking.metal"
)
_limit = Kernel(
    "tie_limit", ["verdict", "position", "head", "state", "numbers"], ["limit"], header="ranking.metal"
)
_mask = Kernel(
    "keep_mask", ["verdict", "position", "head", "limit", "numbers"], ["keep"], header="ranking.metal"
)
_counts = Kernel("head_counts", ["owner"], ["counts"], atomic=True)


def select(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    wanted: Ints,
    seen: Ints,
    heads: int,
    lowest: Floats,
) -> mx.array:
    """The first ``wanted`` candidates of each group, as a mask; all arrays (groups, N).

    First those that ``must`` stay, then by score, ties to the newer and then to the lower ``head``. A head of
    ``heads`` marks no entry. Those that need not stay go if their score is below ``lowest``. Groups may be
    those of many rows: ``wanted``, ``seen`` and ``lowest`` are (groups,).
    """
    groups, count = score.shape
    blocks = (-(-count // BLOCK), groups, 1)
    threads, block = SIMDGROUPS * 32, {"S": SIMDGROUPS, "BLOCK": BLOCK}
    highest = [(((int(n) + 1) * (heads + 1)).bit_length() - 1) // 8 * 8 for n in seen]
    numbers = rows(np.stack([seen, np.full(groups, heads), highest], 1).astype(np.int32))
    lowest_scores = rows(lowest.astype(np.float32))
    # prefix, still wanted below it, equal to it
    none = np.zeros(groups, np.uint64)
    state = rows(np.stack([none, np.minimum(wanted, count).astype(np.uint64), none], 1))
    for shift, bits in DIGITS:
        (histogram,) = _histogram(
            [score, must, head, state, numbers],
            [((groups, 1 << bits), mx.uint32)],
            blocks,
            threads,
            init_value=0,
            SHIFT=shift,
            BITS=bits,
            **block,
        )
        (state,) = _digit(
            [histogram, state],
            [(state.shape, mx.uint64)],
            (groups, 1, 1),
            threads,
            SHIFT=shift,
            BITS=bits,
            S=SIMDGROUPS,
        )
    (verdict,) = _verdict(
        [score, must, head, state, numbers, lowest_scores],
        [(score.shape, mx.uint8)],
        blocks,
        threads,
        **block,
    )
    (limit,) = _limit(
        [verdict, position, head, state, numbers],
        [((max(groups, 8),), mx.uint64)],
        (groups, 1, 1),
        threads,
        S=SIMDGROUPS,
    )
    (keep,) = _mask(
        [verdict, position, head, limit, numbers], [(score.shape, mx.bool_)], blocks, threads, **block
    )
    return keep


def head_counts(owner: mx.array, heads: int) -> mx.array:
    """Entries of each head and, last, of none: (R, heads + 1) int32 for ``owner`` (R, slots)."""
    (counts,) = _counts(
        [owner],
        [((len(owner), heads + 1), mx.int32)],
        (-(-owner.shape[1] // BLOCK), len(owner), 1),
        SIMDGROUPS * 32,
        init_value=0,
        S=SIMDGROUPS,
        BLOCK=BLOCK,
        BINS=heads + 1,
    )
    return counts
