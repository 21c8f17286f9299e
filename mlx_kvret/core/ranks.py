"""One selection over the entries of several processes: what they exchange are counts of digits.

Each process (*rank*) holds some heads. All put their candidates into one total order, must stay before score
before newer token before lower head, and look for the last key that stays digit by digit: the counts of a
digit are summed over the ranks, so that all go the same way. No score, key or position leaves a rank.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import KVRetError, RankError
from .types import Array, Floats, Ints, Mask

# bits of a digit: its counts are 8 KB
DIGIT = 11


class Ranks(abc.ABC):
    """This process and the others it works with; all call the same methods in the same order.

    ``rounds`` and ``nbytes`` count what was summed, one rank's arrays.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.rounds = self.nbytes = 0

    def sum(self, counts: Ints) -> Ints:
        """The sum of int32 arrays of the same shape over all ranks."""
        counts = np.ascontiguousarray(counts, np.int32)
        self.rounds, self.nbytes = self.rounds + 1, self.nbytes + counts.nbytes
        return self._sum(counts)

    def gather(self, array: Array) -> list[Array]:
        """Every rank's array, of any shapes but one type and number of axes."""
        array = np.ascontiguousarray(array)
        shapes = self._gather(np.array(array.shape, np.int32))
        longest = max(int(np.prod(shape)) for shape in shapes) * array.itemsize
        padded = np.zeros(longest, np.uint8)
        padded[: array.nbytes] = array.reshape(-1).view(np.uint8)
        parts = self._gather(padded) if longest else [padded] * self.size
        return [
            part[: int(np.prod(shape)) * array.itemsize].view(array.dtype).reshape(shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def first(self, array: Ints) -> Ints:
        """The first rank's array of int32, which all have in the same shape."""
        return self.sum(array if self.rank == 0 else np.zeros_like(array))

    def first_mask(self, mask: Mask) -> Mask:
        """The first rank's mask, of which all have one of the same shape."""
        bits = np.packbits(np.concatenate([mask.reshape(-1), np.zeros(-mask.size % 32, bool)]))
        found = np.unpackbits(self.first(bits.view(np.int32)).view(np.uint8))
        return found[: mask.size].astype(bool).reshape(mask.shape)

    def agreed(self, action: Callable[[], object]) -> None:
        """Do what one rank may refuse, so that all refuse it.

        Raises:
            RankError: another rank has refused. This one's own error is raised as it is.
        """
        error: KVRetError | None = None
        try:
            action()
        except KVRetError as raised:
            error = raised
        refused = self.sum(np.eye(1, self.size, self.rank, dtype=np.int32)[0] * (error is not None))
        if error is not None:
            raise error
        if refused.any():
            raise RankError(f"rank {int(refused.argmax())} refuses, and says why; no rank goes on without it")

    def alike(self, mark: int, message: str) -> None:
        """Refuse what is not the same on all ranks, by a checksum of 32 bits.

        Raises:
            RankError: with the ``message`` where it differs from the first rank's.
        """
        words = np.array([mark & 0xFFFF, mark >> 16], np.int32)
        same = bool((self.first(words) == words).all())

        def check() -> None:
            if not same:
                raise RankError(message)

        self.agreed(check)

    @functools.cached_property
    def likeliest(self) -> Callable[[Any], Any]:
        """The first rank's tokens (R,) by log probabilities (R, V); one sampler, so rows choose at once."""
        return lambda logprobs: self.token(logprobs.argmax(-1))

    def token(self, token: Any) -> Any:
        """The first rank's tokens (R,), in an array of its backend."""
        raise NotImplementedError

    @abc.abstractmethod
    def _sum(self, counts: Ints) -> Ints: ...

    @abc.abstractmethod
    def _gather(self, array: Array) -> list[Array]:
        """Every rank's array, all of one shape and type."""


@dataclass(frozen=True)
class Digit:
    """Bits ``shift`` to ``shift + bits`` of the first (0) or second (1) word of a key."""

    word: int
    shift: int
    bits: int


# entries of each group by a digit (groups, 2^bits), of those whose higher bits are the group's prefixes
Count = Callable[[Digit, tuple[Ints, Ints]], Ints]


def second_word(seen: int, heads: int) -> tuple[int, int]:
    """How many bits of the second word belong to the position, and how many to the head."""
    return max(1, int(seen).bit_length()), max(1, int(heads).bit_length())


# of the first word: whether it must stay, and the bits of its score; 0 is no entry
FIRST = (Digit(0, 22, 12), Digit(0, 11, 11), Digit(0, 0, 11))


def digits(seen: int, heads: int) -> list[Digit]:
    """The digits of a key, the highest first."""
    found = list(FIRST)
    left = sum(second_word(seen, heads))
    while left:
        bits = min(DIGIT, left)
        left -= bits
        found.append(Digit(1, left, bits))
    return found


def last_keys(
    count: Count, wanted: int | Ints, due: Mask, seen: int, heads: int, ranks: Ranks
) -> tuple[Ints, Ints]:
    """The two words (groups,) of the ``wanted``-th key of each group over all ranks; one number or (groups,).

    Of groups that are not ``due`` (groups,), or have no more than that, they are 0: all entries stay.
    """
    left = np.where(due, wanted, 0).astype(np.int64)
    looking = np.array(due, bool)
    words = np.zeros((2, len(left)), np.int64)
    # -1 is the prefix of no entry: groups that are done count nothing
    prefix = np.where(looking, 0, -1) + np.zeros((2, 1), np.int64)
    for digit in digits(seen, heads):
        if not looking.any():
            break
        counts = ranks.sum(count(digit, (prefix[0], prefix[1])))
        above = np.cumsum(counts[:, ::-1], axis=1, dtype=np.int64)[:, ::-1]
        if digit is FIRST[0]:
            looking &= above[:, 0] > left
        found = (above >= left[:, None]).sum(1) - 1
        group = np.arange(len(left))
        here = counts[group, found]
        left = np.where(looking, left - (above[group, found] - here), left)
        words[digit.word] |= np.where(looking, found.astype(np.int64) << digit.shift, 0)
        prefix[digit.word] = np.where(looking, words[digit.word] >> digit.shift, -1)
        # the digit decides if all that have it stay
        looking &= here > left
        prefix[:, ~looking] = -1
    return words[0], words[1]


def keys_of(
    score: Floats, must: Mask, position: Ints, head: Ints, seen: int, heads: int
) -> tuple[Ints, Ints]:
    """Two words (int64) of each entry, larger for what is kept longer; 0 for a ``head`` ≥ ``heads``."""
    score = np.where(np.isnan(score), -np.inf, score).astype(np.float32) + np.float32(0)
    bits = score.view(np.uint32).astype(np.int64)
    rising = np.where(bits >> 31, 0xFFFFFFFF ^ bits, bits | 0x80000000)
    first = rising + (np.asarray(must).astype(np.int64) << 32) + 1
    _, width = second_word(seen, heads)
    second = (np.asarray(position).astype(np.int64) << width) + (2**width - 1 - np.asarray(head, np.int64))
    alive = np.asarray(head) < heads
    return np.where(alive, first, 0), np.where(alive, second, 0)


def select(
    score: Floats,
    must: Mask,
    position: Ints,
    head: Ints,
    wanted: int | Ints,
    seen: int,
    heads: int,
    ranks: Ranks,
    due: Sequence[bool] | Mask | None = None,
) -> Mask:
    """Which of this rank's candidates are among the first ``wanted`` of their group over all ranks.

    All are (groups, N), ``head`` the flat head of the whole, ``heads`` their number or more for no entry.
    The rule is that of :func:`mlx_kvret.core.eviction.select`; groups that are not ``due`` keep everything.
    """
    first, second = keys_of(score, must, position, head, seen, heads)
    groups = len(first)

    def count(digit: Digit, prefix: tuple[Ints, Ints]) -> Ints:
        word, end = (first, second)[digit.word], digit.shift + digit.bits
        inside = (word >> end) == prefix[digit.word][:, None]
        if digit.word:
            inside &= first == prefix[0][:, None]
        inside &= first > 0
        place = ((word >> digit.shift) & (2**digit.bits - 1)) + (np.arange(groups)[:, None] << digit.bits)
        return np.bincount(place[inside], minlength=groups << digit.bits).reshape(groups, -1)

    due = np.ones(groups, bool) if due is None else np.asarray(due, bool)
    low, lower = last_keys(count, wanted, due, seen, heads, ranks)
    at = first == low[:, None]
    return (first > 0) & ((first > low[:, None]) | (at & (second >= lower[:, None])))


def select_split(
    score: Floats,
    must: Mask,
    position: Ints,
    head: Ints,
    seeing: Mask,
    quota: tuple[int, int],
    wanted: int,
    seen: int,
    heads: int,
    ranks: Ranks,
) -> Mask:
    """As :func:`select` of one group, with the scope ``"modality"``: what ``must`` stay, and then the best.

    These are of text and, where ``seeing``, of pictures as many as their ``quota`` over all ranks.
    """
    open_to_all = ~must & (head < heads)
    own = np.concatenate([open_to_all & ~seeing, open_to_all & seeing])
    most = np.array(quota)
    twice = [np.concatenate([array, array]) for array in (score, position)]
    heads_of = np.where(own, np.concatenate([head, head]), heads)
    best = select(twice[0], np.zeros_like(own), twice[1], heads_of, most, seen, heads, ranks, most > 0)
    # a group that is not due keeps everything
    first = (best & (most > 0)[:, None]).any(0, keepdims=True)
    return select(score, must | first, position, head, wanted, seen, heads, ranks)
