"""The kept entries of all layers: slots that are never moved, only refilled.

Flat heads (layer·H + h) compete in groups of ``size`` consecutive ones. A group owns C slots and one *spill*
slot after them, which takes the writes nobody wants, so that a scatter has a fixed shape whatever survives.
What belongs to which head is told by ``owner``; ``table`` and ``offsets`` list each head's slots (CSR).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..core.types import Ints
from . import kernels
from .kernels import compaction_plan, score_select

# heads are padded to a common length while that costs less than half again of the work
PADDING = 1.5


@dataclass
class Lookup:
    """Slots by head: those of flat head f are ``table[offsets[f]:offsets[f + 1]]``, in any order."""

    table: mx.array
    offsets: mx.array
    host_offsets: Ints | None = None
    _parts: dict[int, list[tuple[slice, int]]] = field(default_factory=dict)
    _padded: dict[tuple[int, int, int], tuple[mx.array, mx.array | None]] = field(default_factory=dict)

    def on_host(self) -> Ints:
        """``offsets`` as numpy; waits for the device once after a compaction."""
        if self.host_offsets is None:
            self.host_offsets = np.array(self.offsets)
        return self.host_offsets

    def parts(self, first: int, count: int) -> list[tuple[slice, int]]:
        """How to take ``count`` heads from flat head ``first`` on: together if padding is cheap, else singly.

        Pairs of a slice of the heads and the longest of them. Waits for the device as :meth:`on_host`.
        """
        if first not in self._parts:
            lengths = np.diff(self.on_host()[first : first + count + 1])
            even = count * int(lengths.max()) <= PADDING * max(int(lengths.sum()), count)
            parts = [slice(0, count)] if even else [slice(head, head + 1) for head in range(count)]
            self._parts[first] = [(part, int(lengths[part].max())) for part in parts]
        return self._parts[first]

    def padded(self, first: int, count: int, width: int) -> tuple[mx.array, mx.array | None]:
        """Slots (count, width) of ``count`` heads from flat head ``first`` on, and which of them are real.

        The mask (count, width) is None where all are. Made once, for every step until the next compaction.
        """
        key = first, count, width
        if key not in self._padded:
            begin = self.offsets[first : first + count, None]
            index = begin + mx.arange(width, dtype=mx.int32)
            real = index < self.offsets[first + 1 : first + count + 1, None]
            exact = bool((np.diff(self.on_host()[first : first + count + 1]) == width).all())
            slots = self.table[mx.minimum(index, self.table.size - 1)]
            mx.async_eval(slots, real)  # the next step may be another thread's
            self._padded[key] = slots, None if exact else real
        return self._padded[key]

    @property
    def nbytes(self) -> int:
        padded = [array for pair in self._padded.values() for array in pair if array is not None]
        return sum(array.nbytes for array in [self.table, self.offsets, *padded])


class Pool:
    """Slots of ``groups`` groups of ``size`` heads, ``capacity`` tokens per head in each.

    ``keys`` (slots, Dk), ``values`` (slots, Dv), ``retention`` (slots,) float32, ``position`` (slots,) int32
    and ``owner`` (slots,) int32, the flat head, or ``heads`` where the slot is free. Attributes get new
    values and are never changed in place, so a shallow copy is a pool of its own; MLX writes where the old
    values stand once nobody holds them.
    """

    def __init__(self, groups: int, size: int) -> None:
        self.groups, self.size, self.heads = groups, size, groups * size
        self.capacity = 0
        self.keys = self.values = mx.zeros((groups, 0))
        self.retention = mx.zeros((groups,), mx.float32)
        self.position = mx.zeros((groups,), mx.int32)
        self.owner = mx.full((groups,), self.heads, mx.int32)
        self._index()

    def grow(self, capacity: int, keys: mx.array, values: mx.array) -> None:
        """Room for ``capacity`` tokens per head, in the types and widths of ``keys`` and ``values``."""
        added = (capacity - self.capacity) * self.size
        if self.capacity == 0:
            self.keys = mx.zeros((self.groups, keys.shape[-1]), keys.dtype)
            self.values = mx.zeros((self.groups, values.shape[-1]), values.dtype)
        for name in ("keys", "values", "retention", "position", "owner"):
            old = getattr(self, name).reshape(self.groups, self.capacity * self.size + 1, -1)
            fill = self.heads if name == "owner" else 0
            # new slots go before the old ones, so that the spill slot stays the last
            wide = mx.full((self.groups, added + old.shape[1], old.shape[-1]), fill, old.dtype)
            wide[:, added:] = old
            setattr(self, name, wide.reshape((-1, old.shape[-1]) if name in ("keys", "values") else (-1,)))
        self.capacity = capacity
        self._index()

    def rows(self, array: mx.array) -> mx.array:
        """An array over slots as (groups, C, ...), without the spill slots."""
        return array.reshape(self.groups, self.capacity * self.size + 1, *array.shape[1:])[:, :-1]

    def destinations(self, keep: mx.array, survives: mx.array) -> mx.array:
        """Slots for newcomers: the n-th survivor of a group fills the group's n-th hole, others are spilled.

        ``keep`` (groups, C) marks entries that stay, ``survives`` (groups, N) newcomers; returns (groups, N)
        flat slot ids, int32.
        """
        if kernels.enabled():
            return compaction_plan.destinations(keep, survives)
        return self.destinations_reference(keep, survives)

    def destinations_reference(self, keep: mx.array, survives: mx.array) -> mx.array:
        """:meth:`destinations` in plain MLX."""
        slots = self.capacity * self.size
        local = mx.arange(slots, dtype=mx.int32)
        holes = mx.sort(mx.where(keep, slots, local), axis=1)
        rank = mx.clip(mx.cumsum(survives.astype(mx.int32), axis=1) - 1, 0, slots - 1)
        place = mx.where(survives, mx.take_along_axis(holes, rank, axis=1), slots)
        return place + mx.arange(self.groups, dtype=mx.int32)[:, None] * (slots + 1)

    def admit(
        self,
        keep: mx.array,
        slots: mx.array,
        survives: mx.array,
        retention: mx.array,
        position: mx.array,
        head: mx.array,
    ) -> None:
        """Free what ``keep`` (groups, C) drops and enter newcomers, all (groups, N), into ``slots``.

        Keys and values follow with :meth:`fill`.
        """
        free = mx.array(self.heads, mx.int32)
        spill = mx.zeros((self.groups, 1), mx.bool_)
        self.owner = mx.where(mx.concatenate([keep, spill], axis=1).reshape(-1), self.owner, free)
        slots = slots.reshape(-1)
        self.owner = _scattered(self.owner, slots, mx.where(survives, head, free).reshape(-1))
        self.retention = _scattered(self.retention, slots, retention.reshape(-1))
        self.position = _scattered(self.position, slots, position.reshape(-1))
        self._index()

    def fill(self, slots: mx.array, keys: mx.array, values: mx.array) -> None:
        """Write ``keys`` (N, Dk) and ``values`` (N, Dv) into ``slots`` (N,), in place where MLX can."""
        self.keys = _scattered(self.keys, slots, keys)
        self.values = _scattered(self.values, slots, values)

    def _index(self) -> None:
        if kernels.enabled() and self.capacity and self.heads <= score_select.MAX_HEADS:
            counts = score_select.head_counts(self.owner, self.heads)
        else:
            counts = mx.zeros((self.heads + 1,), mx.int32).at[self.owner].add(1)
        offsets = mx.concatenate([mx.zeros((1,), mx.int32), mx.cumsum(counts[:-1])])
        used = self.groups * self.capacity * self.size
        self.lookup = Lookup(mx.argsort(self.owner)[:used].astype(mx.int32), offsets.astype(mx.int32))

    def arrays(self) -> list[mx.array]:
        """Everything to be evaluated, saved or counted."""
        return [self.keys, self.values, self.retention, self.position, self.owner]

    def restore(self, capacity: int, arrays: list[mx.array]) -> None:
        """Take over saved :meth:`arrays`."""
        self.capacity = capacity
        self.keys, self.values, self.retention, self.position, self.owner = arrays
        self._index()

    @property
    def nbytes(self) -> int:
        if self.capacity == 0:
            return 0
        return sum(a.nbytes for a in self.arrays()) + self.lookup.nbytes


def _scattered(array: mx.array, slots: mx.array, new: mx.array) -> mx.array:
    array = array[...]  # an array of its own on the same values
    array[slots] = new
    return array
