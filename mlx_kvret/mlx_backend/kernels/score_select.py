"""Scores and radix selection of what stays; the twins are in :mod:`mlx_kvret.mlx_backend.selection`.

The last candidate to stay is found digit by digit (12, 11 and 11 bits of a rank of 34), so the scores are
read four times: three histograms and one verdict. Ties are then decided among the verdicts.
"""

from __future__ import annotations

import mlx.core as mx

from .launch import Kernel, constant

SIMDGROUPS = 8
BLOCK = 8192  # candidates per threadgroup
DIGITS = ((22, 12), (11, 11), (0, 11))  # shift and bits
MAX_HEADS = 8191  # whose counts fill a threadgroup's memory

_score = Kernel("retention_score", ["retention", "position", "numbers"], ["score"], header="scoring.metal")
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


def retention_score(log_beta: mx.array, position: mx.array, seen: int, lookahead: int) -> mx.array:
    """As :func:`mlx_kvret.mlx_backend.selection.retention_score_reference`."""
    (score,) = _score(
        [log_beta, position, mx.array([seen, lookahead, log_beta.size], mx.int32)],
        [(log_beta.shape, mx.float32)],
        (-(-log_beta.size // (SIMDGROUPS * 32)), 1, 1),
        SIMDGROUPS * 32,
        LOOKAHEAD=lookahead > 1,
    )
    return score


def select(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    wanted: int,
    seen: int,
    heads: int,
    lowest: float,
) -> mx.array:
    """The first ``wanted`` candidates of each row, as a mask; all arrays (groups, N).

    First those that ``must`` stay, then by score, ties to the newer and then to the lower ``head``. A head of
    ``heads`` marks no entry. Those that need not stay go if their score is below ``lowest``.
    """
    groups, count = score.shape
    blocks = (-(-count // BLOCK), groups, 1)
    threads, block = SIMDGROUPS * 32, {"S": SIMDGROUPS, "BLOCK": BLOCK}
    highest_byte = (((seen + 1) * (heads + 1)).bit_length() - 1) // 8 * 8
    numbers = mx.array([seen, heads, highest_byte], mx.int32)
    # prefix, still wanted below it, equal to it
    state = mx.array([[0, min(wanted, count), 0]] * groups, mx.uint64)
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
            [((groups, 3), mx.uint64)],
            (groups, 1, 1),
            threads,
            SHIFT=shift,
            BITS=bits,
            S=SIMDGROUPS,
        )
    (verdict,) = _verdict(
        [score, must, head, state, numbers, constant(lowest, dtype=mx.float32)],
        [(score.shape, mx.uint8)],
        blocks,
        threads,
        **block,
    )
    (limit,) = _limit(
        [verdict, position, head, state, numbers],
        [((groups,), mx.uint64)],
        (groups, 1, 1),
        threads,
        S=SIMDGROUPS,
    )
    (keep,) = _mask(
        [verdict, position, head, limit, numbers], [(score.shape, mx.bool_)], blocks, threads, **block
    )
    return keep


def head_counts(owner: mx.array, heads: int) -> mx.array:
    """Entries of each head and, last, of none: (heads + 1,) int32 for ``owner`` (slots,)."""
    (counts,) = _counts(
        [owner],
        [((heads + 1,), mx.int32)],
        (-(-owner.size // BLOCK), 1, 1),
        SIMDGROUPS * 32,
        init_value=0,
        S=SIMDGROUPS,
        BLOCK=BLOCK,
        BINS=heads + 1,
    )
    return counts
