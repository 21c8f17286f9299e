"""Which slots belong to which head, and how attention takes heads together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.types import Ints

# heads are padded to a common length while that costs less than half again of the work
PADDING = 1.5


Members = tuple[int, slice] | tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Part:
    """Heads that attention takes together, padded to ``width`` kept entries.

    ``members`` index their rows and KV heads (n,), None for all heads of all rows. ``slots`` (n, width), or
    (R, H, width) for all; ``real`` of that shape marks what is no padding, None where nothing is.
    """

    members: Members | None
    width: int
    slots: mx.array
    real: mx.array | None


class Lookup:
    """Slots by slab and head.

    Those of flat head f of slab s are ``table[offsets[i]:offsets[i + 1]]``, i = s·(heads + 1) + f, in any
    order; ``used`` places of the table are a slab's. What is worked out from that is kept until it changes.
    """

    def __init__(self, table: mx.array, offsets: mx.array, heads: int, used: int) -> None:
        self.table, self.offsets, self.heads, self.used = table, offsets, heads, used
        self._host: dict[int, Ints] = {}
        self._rows: tuple[int, ...] = ()
        self._parts: dict[int, tuple[list[Part], mx.array | None]] = {}
        self._padded: dict[tuple[int, int, int, int], tuple[mx.array, mx.array | None]] = {}

    @classmethod
    def empty(cls, slabs: int, heads: int, used: int) -> Lookup:
        """Of slabs that hold nothing."""
        start = mx.arange(slabs, dtype=mx.int32) * used
        return cls(mx.zeros((slabs * used,), mx.int32), mx.repeat(start, heads + 1), heads, used)

    def replaced(self, slabs: Sequence[int], table: mx.array, offsets: mx.array) -> Lookup:
        """With other ``table`` (R, used) and ``offsets`` (R, heads + 1) of R slabs."""
        size = self.heads + 1
        count = len(self.offsets) // size
        whole = with_part(self.table.reshape(count, self.used), slabs, table).reshape(-1)
        starts = with_part(self.offsets.reshape(count, size), slabs, offsets).reshape(-1)
        made = Lookup(whole, starts, self.heads, self.used)
        made._host = {other: host for other, host in self._host.items() if other not in slabs}
        return made

    def on_host(self, slab: int = 0) -> Ints:
        """A slab's ``offsets`` as numpy; waits for the device once after a compaction."""
        if slab not in self._host:
            size = self.heads + 1
            self._host[slab] = np.array(self.offsets[slab * size : (slab + 1) * size])
        return self._host[slab]

    def parts(self, first: int, count: int, slabs: tuple[int, ...]) -> tuple[list[Part], mx.array | None]:
        """How to take ``count`` heads of each row from ``first`` on, in as few parts as padding allows.

        Returns them, and where each head stands in their concatenation (R·count,), None if in order.
        Made once, for every step until the next compaction. Waits for the device as :meth:`on_host`.
        """
        if slabs != self._rows:
            self._rows, self._parts = slabs, {}
        if first not in self._parts:
            bounds = np.stack([self.on_host(slab)[first : first + count + 1] for slab in slabs])
            start, length = bounds[:, :-1].reshape(-1), np.diff(bounds).reshape(-1)
            last = np.repeat((np.array(slabs) + 1) * self.used - 1, count)
            together, bounded = _together(length), (start, length, last)
            if len(together) == 1:
                part = self._part(np.arange(len(length)), bounded, None, (len(slabs), count))
                self._parts[first] = [part], None
            else:
                together.sort(key=lambda heads: int(heads[0]))
                found = [self._part(m, bounded, _members(m, len(slabs), count), (len(m),)) for m in together]
                order = np.concatenate(together)
                ordered = (order == np.arange(len(order))).all()
                self._parts[first] = found, None if ordered else mx.array(np.argsort(order).astype(np.int32))
        return self._parts[first]

    def _part(
        self,
        chosen: Ints,
        bounds: tuple[Ints, Ints, Ints],
        members: Members | None,
        shape: tuple[int, ...],
    ) -> Part:
        start, length, last = (array[chosen] for array in bounds)
        width = int(length.max())
        slots, real = self._slots(start, length, last, width)
        if real is not None:
            real = real.reshape(*shape, width)
        return Part(members, width, slots.reshape(*shape, width), real)

    def padded(self, first: int, count: int, width: int, slab: int = 0) -> tuple[mx.array, mx.array | None]:
        """Slots (count, width) of ``count`` heads of a slab from flat head ``first`` on, and which are real.

        The mask (count, width) is None where all are. Made once, for every step until the next compaction.
        """
        key = slab, first, count, width
        if key not in self._padded:
            bounds = self.on_host(slab)[first : first + count + 1]
            last = np.full(count, (slab + 1) * self.used - 1)
            self._padded[key] = self._slots(bounds[:-1], np.diff(bounds), last, width)
        return self._padded[key]

    def _slots(self, start: Ints, length: Ints, last: Ints, width: int) -> tuple[mx.array, mx.array | None]:
        """Slots (n, width) from ``start`` on, none after ``last``, which would be another row's."""
        bounds = mx.array(np.stack([start, length, last]).astype(np.int32))[..., None]
        place = mx.arange(width, dtype=mx.int32)
        slots = self.table[mx.minimum(bounds[0] + place, bounds[2])]
        real = None if (length == width).all() else place < bounds[1]
        mx.async_eval(slots, [] if real is None else real)  # the next step may be another thread's
        return slots, real

    @property
    def nbytes(self) -> int:
        pairs = list(self._padded.values())
        pairs += [(part.slots, part.real) for parts, _ in self._parts.values() for part in parts]
        made = [array for pair in pairs for array in pair if array is not None]
        return sum(array.nbytes for array in [self.table, self.offsets, *made])


def part_of(array: mx.array, slabs: Sequence[int]) -> mx.array:
    """Of an array (slabs, ...) those of ``slabs``, a view where they are neighbours."""
    first, end = slabs[0], slabs[-1] + 1
    if list(slabs) == list(range(first, end)):
        return array if end - first == len(array) else array[first:end]
    return array[mx.array(list(slabs), mx.int32)]


def with_part(array: mx.array, slabs: Sequence[int], parts: mx.array) -> mx.array:
    """An array (slabs, ...) with those of ``slabs`` replaced, in place where MLX can."""
    first, end = slabs[0], slabs[-1] + 1
    if list(slabs) == list(range(len(array))):
        return parts
    array = array[...]  # an array of its own on the same values
    array[
        slice(first, end) if list(slabs) == list(range(first, end)) else mx.array(list(slabs), mx.int32)
    ] = parts
    return array


def _members(chosen: Ints, rows: int, count: int) -> Members:
    """Rows and KV heads; neighbours of one row as a slice, which copies nothing."""
    first, size = int(chosen.min()), len(chosen)
    if rows == 1 and (chosen == np.arange(first, first + size)).all():
        return 0, slice(first, first + size)
    row, head = np.divmod(chosen, count)
    return mx.array(row.astype(np.int32)), mx.array(head.astype(np.int32))


def _together(length: Ints) -> list[Ints]:
    """Heads of similar lengths (N,): all if padding them is cheap, else the longest first."""

    def cheap(count: int, longest: int, total: int) -> bool:
        return count * longest <= PADDING * max(total, count)

    if cheap(len(length), int(length.max()), int(length.sum())):
        return [np.arange(len(length))]
    order, found, begin, total = np.argsort(-length, kind="stable"), [], 0, 0
    for end, head in enumerate(order):
        if end > begin and not cheap(end + 1 - begin, int(length[order[begin]]), total + int(length[head])):
            found.append(np.sort(order[begin:end]))
            begin, total = end, 0
        total += int(length[head])
    return [*found, np.sort(order[begin:])]
