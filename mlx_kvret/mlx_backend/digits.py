"""Keys of the total order in which entries are kept, as whole numbers, and a selection by counting digits."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..core.config import EvictionConfig
from ..core.eviction import own_quotas
from ..core.pictures import Pictures
from ..core.ranks import Digit, last_keys, second_word
from ..core.shares import Share
from ..core.types import Ints, Mask


def ascending_bits(score: mx.array) -> mx.array:
    """float32 to int64 in [0, 2^32) of the same order; NaN counts as the lowest, -0 as 0."""
    score = mx.where(mx.isnan(score), -math.inf, score) + 0.0
    bits = score.view(mx.uint32)
    return mx.where(bits >> 31, ~bits, bits | 0x80000000).astype(mx.int64)


def over_ranks(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    wanted: int | Ints,
    seen: int,
    share: Share,
    due: Mask,
) -> mx.array:
    """As :func:`mlx_kvret.core.ranks.select`; ``head`` counts this rank's, as many or more is no entry."""
    first, second = _keys(score, must, position, head, seen, share)
    groups = first.shape[0]

    def count(digit: Digit, prefix: tuple[Ints, Ints]) -> Ints:
        word, end = (first, second)[digit.word], digit.shift + digit.bits
        inside = (first > 0) & ((word >> end) == _column(prefix[digit.word]))
        if digit.word:
            inside = inside & (first == _column(prefix[0]))
        place = (word >> digit.shift) & (2**digit.bits - 1)
        # what does not count goes to a place of its own
        place = mx.where(inside, place, 2**digit.bits).astype(mx.int32)
        place = place + mx.arange(groups, dtype=mx.int32)[:, None] * (2**digit.bits + 1)
        counts = mx.zeros((groups * (2**digit.bits + 1),), mx.int32).at[place.reshape(-1)].add(1)
        return np.array(counts.reshape(groups, -1)[:, :-1])

    lowest = last_keys(count, wanted, due, seen, share.whole.heads, share.ranks)
    low, lower = (_column(words) for words in lowest)
    return (first > 0) & ((first > low) | ((first == low) & (second >= lower)))


def within_quotas(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    seen: int,
    config: EvictionConfig,
    share: Share,
    pictures: Pictures,
) -> mx.array:
    """The best candidates, of all ranks, of text and of pictures, as many as each one's quota, (1, N)."""
    marked, most = own_quotas(pictures, seen, config, share.whole.heads)
    quota, none = np.array(most), share.shape.heads
    seeing = mx.array(marked)[mx.minimum(position, seen - 1)]
    open_to_all = (head < none) & ~must
    own = mx.concatenate([open_to_all & ~seeing, open_to_all & seeing])
    twice = [mx.concatenate([array, array]) for array in (score, position, head)]
    heads = mx.where(own, twice[2], none)
    # a group that is not due keeps everything
    some = quota > 0
    best = over_ranks(twice[0], mx.zeros(own.shape, mx.bool_), twice[1], heads, quota, seen, share, some)
    return (best & mx.array(some)[:, None]).any(0, keepdims=True)


def _keys(
    score: mx.array, must: mx.array, position: mx.array, head: mx.array, seen: int, share: Share
) -> tuple[mx.array, mx.array]:
    """As :func:`mlx_kvret.core.ranks.keys_of`."""
    own, alive = share.shape.heads, head < share.shape.heads
    first = mx.where(alive, ascending_bits(score) + (must.astype(mx.int64) << 32) + 1, 0)
    flat = mx.array(share.heads.astype(np.int64))[mx.minimum(head, own - 1)]
    _, width = second_word(seen, share.whole.heads)
    second = (position.astype(mx.int64) << width) + (2**width - 1 - flat)
    return first, mx.where(alive, second, 0)


def _column(words: Ints) -> mx.array:
    return mx.array(words.astype(np.int64))[:, None]
