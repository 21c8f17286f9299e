# mypy: allow-untyped-defs
"""Radix selection in Triton: the k best candidates of each segment by the exact tie rule, without sorting.

A candidate's rank is a number of two words: ``high`` tells protected from other and the score's bits, ``low``
the position, newer first, and then the lower head. Numbers of a segment differ, so that the k-th largest is a
threshold that k candidates reach. It is found digit by digit from the top: a histogram of the next 8 bits of
those that share the digits so far, then a step to the digit in which the k-th lies (radix select).
:func:`cuda_backend.selection.select` is the specification.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from mlx_kvret.core.config import EvictionConfig

from ..selection import ascending_bits

BLOCK = 1024
HIGH_BITS, LOW_BITS, HEAD_BITS = 40, 56, 24


@triton.jit(do_not_specialize=["count", "shift"])
def rank_histogram_kernel(
    p_high, p_low, p_segment, p_prefix, p_counts, count, shift,
    IN_LOW: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the next digit of all candidates that share their segment's ``prefix``, in (segments, 256).

    Candidates are (groups, ``count``). TOGETHER says that a group is a segment: then a program counts by
    itself first, for the first digits of all candidates are few.
    """
    group, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = group.to(tl.int64) * count + place
    b_segment = tl.load(p_segment + at, mask=place < count, other=-1)
    b_here = b_segment >= 0
    b_high = tl.load(p_high + at, mask=b_here, other=0)
    b_prefix = tl.load(p_prefix + b_segment * 2, mask=b_here, other=0)
    if IN_LOW:
        b_word = tl.load(p_low + at, mask=b_here, other=0)
        b_here = b_here & (b_high == b_prefix)
        b_prefix = tl.load(p_prefix + b_segment * 2 + 1, mask=b_here, other=0)
    else:
        b_word = b_high
    b_here = b_here & ((b_word >> (shift + 8)) == (b_prefix >> (shift + 8)))
    b_digit = ((b_word >> shift) & 255).to(tl.int32)
    if TOGETHER:
        b_count = tl.histogram(b_digit, 256, mask=b_here)
        tl.atomic_add(p_counts + group * 256 + tl.arange(0, 256), b_count, mask=b_count > 0)
    else:
        tl.atomic_add(p_counts + b_segment * 256 + b_digit, 1, mask=b_here)


@triton.jit(do_not_specialize=["shift"])
def rank_digit_kernel(p_counts, p_prefix, p_wanted, shift, IN_LOW: tl.constexpr):
    """The largest digit that ``wanted`` candidates reach; they are ``wanted`` less those of larger digits."""
    segment = tl.program_id(0)
    digit = tl.arange(0, 256)
    b_count = tl.load(p_counts + segment * 256 + digit)
    tl.store(p_counts + segment * 256 + digit, tl.zeros([256], tl.int32))
    wanted = tl.load(p_wanted + segment)
    # how many have this digit or a larger one
    b_reach = tl.cumsum(b_count, 0, reverse=True)
    found = tl.sum((b_reach >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(digit > found, b_count, 0), 0)
    # a segment of fewer than wanted candidates keeps them all: its threshold stays 0
    enough = found >= 0
    tl.store(p_wanted + segment, tl.where(enough, wanted - above, wanted))
    at = p_prefix + segment * 2 + IN_LOW
    tl.store(at, tl.load(at) | tl.where(enough, found, 0).to(tl.int64) << shift)


def radix_select(
    high: torch.Tensor, low: torch.Tensor, segment: torch.Tensor, wanted: torch.Tensor, together: bool = False
) -> torch.Tensor:
    """The ``wanted`` (segments,) largest numbers of each segment, as a mask (groups, N).

    ``high`` and ``low`` (groups, N) are int64 of 40 and 56 bits, ``segment`` (groups, N) int32, below 0 for
    none; ``together`` says that those of a group are in the segment of its number.
    """
    (groups, count), segments = high.shape, len(wanted)
    prefix = torch.zeros(segments, 2, dtype=torch.int64, device=high.device)
    counts = torch.zeros(segments, 256, dtype=torch.int32, device=high.device)
    left = wanted.to(torch.int32).clone()
    # groups of all rows may be more than a grid's second axis takes
    grid = (groups, triton.cdiv(count, BLOCK))
    for in_low, bits in ((False, HIGH_BITS), (True, LOW_BITS)):
        for shift in range(bits - 8, -1, -8):
            rank_histogram_kernel[grid](
                high, low, segment, prefix, counts, count, shift, in_low, together, BLOCK
            )
            rank_digit_kernel[(segments,)](counts, prefix, left, shift, in_low)
    own = prefix[segment.clamp(min=0).long()]
    above = (high > own[..., 0]) | ((high == own[..., 0]) & (low >= own[..., 1]))
    return above & (segment >= 0)


def select_triton(
    score: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    seen: torch.Tensor | int,
    config: EvictionConfig,
    size: int,
    heads: int,
    budget: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """As :func:`cuda_backend.selection.select`."""
    groups, device = len(score), score.device
    alive = head < heads
    must = (position < config.sinks) | (position >= seen - config.window)
    low = (position.long() << HEAD_BITS) + (2**HEAD_BITS - 1 - head.long())
    bits = ascending_bits(score)

    def best(must: torch.Tensor, segment: torch.Tensor, wanted: torch.Tensor, together: bool) -> torch.Tensor:
        segment = torch.where(alive, segment, -1).to(torch.int32)
        return radix_select(bits + (must.long() << 32), low, segment, wanted, together)

    group = torch.arange(groups, device=device)[:, None]
    if config.min_per_head:
        # heads of other sequences are others
        per_sequence = heads // size
        least = torch.full((groups // per_sequence * heads,), config.min_per_head, device=device)
        must = must | best(must, head + group // per_sequence * heads, least, False)
    wanted = torch.zeros(groups, 1, dtype=torch.int32, device=device)
    wanted += (config.budget if budget is None else budget) * size
    keep = best(must, group.expand_as(head), wanted[:, 0], True)
    if config.threshold is not None:
        keep = keep & (must | (score >= math.log(config.threshold)))
    return keep
