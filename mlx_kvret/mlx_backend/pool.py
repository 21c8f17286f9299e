"""The kept entries of all layers of every slab: slots that are never moved, only refilled.

Flat heads (layer·H + h) compete in groups of ``size`` consecutive ones. A slab is the room of one sequence:
each of its groups owns C slots and one *spill* slot after them, which takes the writes nobody wants, so that
a scatter has a fixed shape whatever survives. What belongs to which head is told by ``owner``; a
:class:`.lookup.Lookup` lists each head's slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..core.bits import Packing
from ..core.types import Ints
from . import kernels
from .kernels import compaction_plan, score_select
from .lookup import Lookup, part_of, with_part
from .packing import pack, unpack

_ARRAYS = ("keys", "values", "retention", "position", "owner")


class Pool:
    """``slabs`` slabs of ``groups`` groups of ``size`` heads, ``capacity`` tokens per head in each.

    ``keys`` (slots, Dk), ``values`` (slots, Dv), ``retention`` (slots,) float32, ``position`` (slots,) int32
    and ``owner`` (slots,) int32, the flat head, or ``heads`` where the slot is free; slab s begins at slot
    s·``room``. With ``forms`` keys and values are rows of packed words, for floats of ``dtype``. Attributes
    get new values and are never changed in place, so a shallow copy is a pool of its own; MLX writes where
    the old values stand once nobody holds them.
    """

    def __init__(
        self, groups: int, size: int, slabs: int = 1, forms: tuple[Packing, Packing] | None = None
    ) -> None:
        self.groups, self.size, self.heads, self.slabs = groups, size, groups * size, slabs
        self.forms, self.dtype = forms, mx.float32
        self.capacity = 0
        self.keys = self.values = mx.zeros((slabs * groups, 0))
        self.retention = mx.zeros((slabs * groups,), mx.float32)
        self.position = mx.zeros((slabs * groups,), mx.int32)
        self.owner = mx.full((slabs * groups,), self.heads, mx.int32)
        self.lookup = Lookup.empty(slabs, self.heads, 0)

    @property
    def room(self) -> int:
        """Slots of a slab, spill slots included."""
        return self.groups * (self.capacity * self.size + 1)

    @property
    def entry_bytes(self) -> int:
        """Of a kept entry's key and value."""
        keys, values = self.keys, self.values
        return int(keys.shape[1] * keys.dtype.size + values.shape[1] * values.dtype.size)

    # ------------------------------------------------------------------ room

    def grow(self, capacity: int, keys: mx.array, values: mx.array) -> None:
        """Room for ``capacity`` tokens per head in every slab, for floats of these types and widths."""
        if self.capacity == 0:
            self.dtype = keys.dtype
        self._grow(capacity, self._row(keys, 0), self._row(values, 1))

    def grow_like(self, other: Pool) -> None:
        """As much room as another pool of the same forms has."""
        if self.capacity == 0:
            self.dtype = other.dtype
        keys, values = ((a.shape[-1], a.dtype) for a in (other.keys, other.values))
        self._grow(other.capacity, keys, values)

    def _row(self, array: mx.array, which: int) -> tuple[int, mx.Dtype]:
        """Width and type of what stands in a slot."""
        if self.forms is None:
            return array.shape[-1], array.dtype
        return self.forms[which].words(array.dtype.size), mx.uint32

    def _grow(self, capacity: int, keys: tuple[int, mx.Dtype], values: tuple[int, mx.Dtype]) -> None:
        groups, added = self.slabs * self.groups, (capacity - self.capacity) * self.size
        if self.capacity == 0:
            self.keys, self.values = (mx.zeros((groups, width), dtype) for width, dtype in (keys, values))
        for name in _ARRAYS:
            old = getattr(self, name).reshape(groups, self.capacity * self.size + 1, -1)
            fill = self.heads if name == "owner" else 0
            # new slots go before the old ones, so that the spill slot stays the last
            wide = mx.full((groups, added + old.shape[1], old.shape[-1]), fill, old.dtype)
            wide[:, added:] = old
            setattr(self, name, wide.reshape((-1, old.shape[-1]) if name in ("keys", "values") else (-1,)))
        self.capacity = capacity
        self.index()

    def resized(self, kept: list[int], count: int) -> Pool:
        """A pool of ``count`` slabs, those of ``kept`` first and then empty ones."""
        made = Pool(self.groups, self.size, count, self.forms)
        made.capacity, made.dtype = self.capacity, self.dtype
        for name in _ARRAYS:
            old = getattr(self, name)
            by_slab = old.reshape(self.slabs, self.room, *old.shape[1:])
            if kept != list(range(self.slabs)):
                # a copy even of a single slab: a view would hold on to all of them
                by_slab = by_slab[mx.array(kept, mx.int32)]
            if empty := count - len(kept):
                fill = self.heads if name == "owner" else 0
                new = mx.full((empty, *by_slab.shape[1:]), fill, old.dtype)
                by_slab = mx.concatenate([by_slab, new])
            setattr(made, name, by_slab.reshape(count * self.room, *old.shape[1:]))
        made.index()
        return made

    def take(self, slab: int, other: Pool, source: int) -> None:
        """All of another pool's slab ``source``, of the same capacity, into ``slab``.

        Nothing is left of what was there: no row's padding may ever be another's NaN.
        """
        for name in _ARRAYS:
            theirs = getattr(other, name)
            # gathered, for a slice would hold on to its array, which may be ours: then all would be copied
            by_slab = theirs.reshape(other.slabs, other.room, *theirs.shape[1:])
            own = by_slab[mx.array([source], mx.int32)]
            setattr(self, name, self._with(getattr(self, name), (slab,), own))
        self.index(slab)

    # ------------------------------------------------------------------ entries of one slab

    def rows(self, array: mx.array, slab: int = 0) -> mx.array:
        """A slab's part of an array over slots as (groups, C, ...), without the spill slots."""
        own = self.of(array, (slab,))
        return own.reshape(self.groups, self.capacity * self.size + 1, *array.shape[1:])[:, :-1]

    def kept(self, slab: int = 0) -> tuple[Ints, Ints]:
        """Where each head's entries (heads + 1,) begin and end among the slab's, and their positions."""
        used = self.lookup.used
        slots = self.lookup.table[slab * used : (slab + 1) * used]
        return self.lookup.on_host(slab) - slab * used, np.array(self.position[slots])

    def destinations(self, keep: mx.array, slabs: Sequence[int] = (0,)) -> mx.array:
        """Slots for newcomers: the n-th that stays fills its group's n-th hole, others are spilled.

        ``keep`` (R·groups, C + N) marks entries and then newcomers that stay, of the groups of each of R
        ``slabs``; returns (R·groups, N) slot ids, int32.
        """
        slots = self.capacity * self.size
        base = np.array(slabs)[:, None] * self.room + np.arange(self.groups) * (slots + 1)
        given = keep, base.reshape(-1).astype(np.int32), slots
        return kernels.either(
            lambda: compaction_plan.destinations(*given), lambda: destinations_reference(*given)
        )

    def admit(
        self,
        stays: mx.array,
        slots: mx.array,
        survives: mx.array,
        retention: mx.array,
        position: mx.array,
        head: mx.array,
        slabs: Sequence[int] = (0,),
    ) -> None:
        """Free what ``stays`` (R·groups, C) does not mark, and enter newcomers, all (n,), into ``slots``.

        Keys and values follow with :meth:`fill`.
        """
        free, slots = mx.array(self.heads, mx.int32), slots.reshape(-1)
        stays = mx.pad(stays, [(0, 0), (0, 1)]).reshape(len(slabs), -1)
        owner = self._with(self.owner, slabs, mx.where(stays, self.of(self.owner, slabs), free))
        self.owner = _scattered(owner, slots, mx.where(survives, head, free).reshape(-1))
        self.retention = _scattered(self.retention, slots, retention.reshape(-1))
        self.position = _scattered(self.position, slots, position.reshape(-1))
        self.index(*slabs)

    def fill(self, slots: mx.array, keys: mx.array, values: mx.array) -> None:
        """Write ``keys`` (N, Dk) and ``values`` (N, Dv) into ``slots`` (N,), in place where MLX can.

        This is where they are packed, once; what has been packed may be given as well.
        """
        self.keys = _scattered(self.keys, slots, self._packed(keys, 0))
        self.values = _scattered(self.values, slots, self._packed(values, 1))

    def keys_at(self, slots: mx.array) -> mx.array:
        """Keys (..., Dk) as floats, a copy."""
        return self._floats(self.keys[slots], 0)

    def values_at(self, slots: mx.array) -> mx.array:
        """Values (..., Dv) as floats, a copy."""
        return self._floats(self.values[slots], 1)

    def slab_keys(self, slab: int) -> mx.array:
        """A slab's keys as floats (groups, C, Dk)."""
        return self._floats(self.rows(self.keys, slab), 0)

    def as_kept(self, keys: mx.array) -> mx.array:
        """Keys (..., Dk) as they will be read once they are kept."""
        return self._floats(self._packed(keys, 0), 0, keys.dtype)

    def _packed(self, array: mx.array, which: int) -> mx.array:
        if self.forms is None or array.dtype == mx.uint32:
            return array
        return pack(self.forms[which], array)

    def _floats(self, rows: mx.array, which: int, dtype: mx.Dtype | None = None) -> mx.array:
        return rows if self.forms is None else unpack(self.forms[which], rows, dtype or self.dtype)

    def index(self, *slabs: int) -> None:
        """List each head's slots anew, of some slabs or of all."""
        used = self.groups * self.capacity * self.size
        if not (slabs and self.capacity):
            self.lookup = Lookup.empty(self.slabs, self.heads, used)
        which = slabs or tuple(range(self.slabs)) if self.capacity else ()
        if not which:
            return
        owner = self.of(self.owner, which)
        ends = mx.cumsum(self._counts(owner)[:, :-1], axis=1).astype(mx.int32)
        offsets = mx.pad(ends, [(0, 0), (1, 0)])
        table = mx.argsort(owner, axis=1)[:, :used].astype(mx.int32)
        if any(which):
            first = mx.array(which, mx.int32)[:, None]
            offsets, table = offsets + first * used, table + first * self.room
        self.lookup = self.lookup.replaced(which, table, offsets)

    def _counts(self, owner: mx.array) -> mx.array:
        """Entries of each head and, last, of none (R, heads + 1)."""

        def plain() -> mx.array:
            rows = mx.arange(len(owner))[:, None]
            return mx.zeros((len(owner), self.heads + 1), mx.int32).at[rows, owner].add(1)

        if self.heads > score_select.MAX_HEADS:
            return plain()
        return kernels.either(lambda: score_select.head_counts(owner, self.heads), plain)

    def of(self, array: mx.array, slabs: Sequence[int]) -> mx.array:
        """The part of an array over slots that belongs to each of R slabs, (R, room, ...)."""
        return part_of(array.reshape(self.slabs, self.room, *array.shape[1:]), slabs)

    def _with(self, array: mx.array, slabs: Sequence[int], parts: mx.array) -> mx.array:
        """An array over slots with the parts (R, room, ...) that belong to R slabs replaced."""
        shape = array.shape
        return with_part(array.reshape(self.slabs, self.room, *shape[1:]), slabs, parts).reshape(shape)

    def arrays(self) -> list[mx.array]:
        """Everything to be evaluated, saved or counted."""
        return [getattr(self, name) for name in _ARRAYS]

    def restore(self, capacity: int, arrays: list[mx.array]) -> None:
        """Take over saved :meth:`arrays`."""
        self.capacity = capacity
        self.keys, self.values, self.retention, self.position, self.owner = arrays
        self.index()

    @property
    def nbytes(self) -> int:
        if self.capacity == 0:
            return 0
        return sum(a.nbytes for a in self.arrays()) + self.lookup.nbytes


def destinations_reference(keep: mx.array, base: Ints, slots: int) -> mx.array:
    """:meth:`Pool.destinations` in plain MLX, of groups of so many slots that begin at ``base`` (groups,)."""
    stays, survives = keep[:, :slots], keep[:, slots:]
    local = mx.arange(slots, dtype=mx.int32)
    holes = mx.sort(mx.where(stays, slots, local), axis=1)
    rank = mx.clip(mx.cumsum(survives.astype(mx.int32), axis=1) - 1, 0, slots - 1)
    place = mx.where(survives, mx.take_along_axis(holes, rank, axis=1), slots)
    return place + mx.array(base)[:, None]


def _scattered(array: mx.array, slots: mx.array, new: mx.array) -> mx.array:
    array = array[...]  # an array of its own on the same values
    array[slots] = new
    return array
