"""The kept entries of all layers and sequences: slots that are never moved, only refilled.

A slab is the room of one sequence. Its flat heads (layer·H + h) compete in groups of ``size`` consecutive
ones. A group owns C slots and one *spill* slot after them, which takes the writes nobody wants, so that a
scatter has a fixed shape whatever survives. What belongs to which head is told by ``owner``; ``table`` and
``offsets`` list each head's slots (CSR). All of these count within the slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mlx_kvret.core.bits import Packing
from mlx_kvret.core.types import Ints

from .packing import pack, unpack

ARRAYS = ("keys", "values", "retention", "position", "owner")
LISTS = ("table", "offsets")


class Pool:
    """Slots of ``slabs`` slabs of ``groups`` groups of ``size`` heads, ``capacity`` tokens per head in each.

    With S slabs of n slots: ``keys`` (S, n, Dk) and ``values`` (S, n, Dv) in the float type of ``like``, or
    rows of int32 words packed as ``forms`` say; ``retention`` (S, n) float32, ``position`` (S, n) int32 and
    ``owner`` (S, n) int32, the flat head, or ``heads`` where the slot is free.
    Slots of a slab's flat head f are ``table[slab, offsets[slab, f]:offsets[slab, f + 1]]``, in any order.
    """

    keys: torch.Tensor
    values: torch.Tensor
    retention: torch.Tensor
    position: torch.Tensor
    owner: torch.Tensor
    table: torch.Tensor
    offsets: torch.Tensor
    # offsets on the host, by slab, where somebody has asked for them
    _hosts: list[Ints | None]

    def __init__(
        self,
        slabs: int,
        groups: int,
        size: int,
        device: torch.device,
        packings: tuple[Packing, Packing] | None = None,
    ) -> None:
        self.groups, self.size, self.heads = groups, size, groups * size
        self.capacity = 0
        self.forms: tuple[Packing | None, Packing | None] = packings or (None, None)
        empty = torch.zeros(slabs, groups, device=device)
        # a key and a value of none, which tell types and widths
        self.like = empty[:0], empty[:0]
        owner = torch.full((slabs, groups), self.heads, dtype=torch.int32, device=device)
        self._take([empty[..., None][..., :0]] * 2 + [empty, empty.int(), owner], 0)

    @property
    def slabs(self) -> int:
        return len(self.owner)

    @property
    def slots(self) -> int:
        """n: slots of a slab, the spilled ones included."""
        return self.owner.shape[1]

    def _take(self, arrays: Sequence[torch.Tensor], capacity: int) -> None:
        """Have these ``ARRAYS``, of that capacity, all at once."""
        owner = arrays[-1]
        used = self.groups * capacity * self.size
        table, offsets = listing(owner, self.heads, used)
        made = zip((*ARRAYS, *LISTS), (*arrays, table, offsets), strict=True)
        vars(self).update(made, capacity=capacity, _hosts=[None] * len(owner))

    def grow(self, capacity: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for ``capacity`` tokens per head, in the types and widths of ``keys`` and ``values``."""
        arrays = [getattr(self, name) for name in ARRAYS]
        if self.capacity == 0:
            self.like = keys.new_empty(0, keys.shape[-1]), values.new_empty(0, values.shape[-1])
            rows = (self.stored(which, a.new_zeros(1, a.shape[-1])) for which, a in enumerate(self.like))
            arrays[:2] = (row.new_zeros(*self.owner.shape, row.shape[-1]) for row in rows)
        # all new arrays exist before an old one goes, so that being broken off changes nothing
        self._take([self._widened(a, capacity, a is self.owner) for a in arrays], capacity)

    def _widened(self, array: torch.Tensor, capacity: int, heads: bool) -> torch.Tensor:
        shape, rest = (self.slabs, self.groups), array.shape[2:]
        old = array.view(*shape, self.capacity * self.size + 1, *rest)
        wide = old.new_full((*shape, capacity * self.size + 1, *rest), self.heads if heads else 0)
        # new slots go before the old ones, so that the spill slot stays the last
        wide[:, :, (capacity - self.capacity) * self.size :] = old
        return wide.view(self.slabs, -1, *rest)

    def resized(self, count: int, sources: Sequence[int]) -> dict[str, Any]:
        """The attributes with ``count`` slabs, of which the first ones are those of ``sources``."""
        made: dict[str, Any] = {}
        for name in (*ARRAYS, *LISTS):
            made[name] = resized(getattr(self, name), 0, count, sources, self.heads if name == "owner" else 0)
        made["_hosts"] = [self._hosts[source] for source in sources] + [None] * (count - len(sources))
        return made

    def copy_slab(self, source: int, target: int) -> None:
        """Have slab ``target`` hold what ``source`` holds."""
        for name in (*ARRAYS, *LISTS):
            array = getattr(self, name)
            array[target] = array[source]
        self._hosts[target] = self._hosts[source]

    def stored(self, which: int, vectors: torch.Tensor) -> torch.Tensor:
        """Keys (``which`` is 0) or values (1), (..., D), as rows of the pool; words are that already."""
        form = self.forms[which]
        return vectors if form is None or not vectors.is_floating_point() else pack(vectors, form)

    def read(self, which: int, rows: torch.Tensor) -> torch.Tensor:
        """What stands in rows of ``keys`` (``which`` is 0) or ``values`` (1), (..., D)."""
        form = self.forms[which]
        return rows if form is None else unpack(rows, form, self.like[which].dtype)

    def as_kept(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys (..., Dk) as they will be read once they are kept."""
        form = self.forms[0]
        return keys if form is None else unpack(pack(keys, form), form, keys.dtype)

    # ------------------------------------------------------------------ a compaction of R slabs

    def of(self, array: torch.Tensor, slabs: Sequence[int]) -> torch.Tensor:
        """An array over slots of slabs (R, n), a view where there is one."""
        if len(slabs) == 1:
            return array[slabs[0] : slabs[0] + 1]
        return array[torch.tensor(slabs).to(array.device, non_blocking=True)]

    def groups_of(self, array: torch.Tensor) -> torch.Tensor:
        """An array over slots of slabs (R, n) as (R·groups, C), without the spill slots."""
        return array.view(-1, self.capacity * self.size + 1)[:, :-1]

    def destinations(self, keep: torch.Tensor, survives: torch.Tensor, slabs: Sequence[int]) -> torch.Tensor:
        """Slots for newcomers: the n-th survivor of a group fills the group's n-th hole, others are spilled.

        ``keep`` (R·groups, C) marks entries that stay, ``survives`` (R·groups, N) newcomers; returns
        (R·groups, N) slots, int64, which count over all slabs.
        """
        slots, device = self.capacity * self.size, keep.device
        local = torch.arange(slots, device=device).expand_as(keep)
        # each hole is written to the place of its rank, and what is none behind them
        rank = torch.where(keep, slots, (~keep).cumsum(1) - 1)
        holes = torch.full_like(rank, slots)
        holes = F.pad(holes, (0, 1)).scatter_(1, rank, local)
        rank = (survives.cumsum(1) - 1).clamp(0, slots - 1)
        place = torch.where(survives, holes.gather(1, rank), slots)
        first = torch.tensor(slabs).to(device, non_blocking=True)[:, None] * self.slots
        return place + (first + torch.arange(self.groups, device=device) * (slots + 1)).view(-1, 1)

    def admitted(
        self,
        keep: torch.Tensor,
        slots: torch.Tensor,
        survives: torch.Tensor,
        retention: torch.Tensor,
        position: torch.Tensor,
        head: torch.Tensor,
        slabs: Sequence[int],
    ) -> dict[str, torch.Tensor]:
        """The slabs' accounts once what ``keep`` (R·groups, C) drops is free and newcomers are in ``slots``.

        All others are of any shape, one slab's after the other's. Keys and values follow with :meth:`fill`.
        """
        owner = self.of(self.owner, slabs).clone()
        self.groups_of(owner).masked_fill_(~keep, self.heads)
        local = slots.view(len(slabs), -1) % self.slots
        new = torch.where(survives, head, self.heads), retention, position
        old = owner, self.of(self.retention, slabs), self.of(self.position, slabs)
        filled = {
            name: array.scatter(1, local, values.to(array.dtype).reshape(local.shape))
            for name, array, values in zip(("owner", "retention", "position"), old, new, strict=True)
        }
        table, offsets = listing(filled["owner"], self.heads, self.table.shape[1])
        return filled | {"table": table, "offsets": offsets}

    def take(self, arrays: dict[str, torch.Tensor], slabs: Sequence[int]) -> None:
        """Put :meth:`admitted` arrays where a captured step reads them; twice is as good as once."""
        index = torch.tensor(slabs).to(self.owner.device, non_blocking=True)
        for name, array in arrays.items():
            getattr(self, name).index_copy_(0, index, array)
        for slab in slabs:
            self.forget(slab)

    def fill(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write ``keys`` (N, Dk) and ``values`` (N, Dv) into ``slots`` (N,) of all slabs, in place.

        This is where they are packed, once.
        """
        for which, (array, new) in enumerate(((self.keys, keys), (self.values, values))):
            array.flatten(0, 1)[slots] = self.stored(which, new)

    def slab(self, index: int) -> Slab:
        """One slab, to be read and written in place."""
        return Slab(self, index)

    def host_offsets(self, index: int) -> Ints:
        """Offsets (heads + 1,) of a slab as numpy; waits for the device once after a compaction."""
        found = self._hosts[index]
        if found is None:
            # a copy, for on a CPU the numbers would change with the tensor
            found = self._hosts[index] = self.offsets[index].cpu().numpy().copy()
        return found

    def forget(self, index: int) -> None:
        """Offsets of a slab have changed."""
        self._hosts[index] = None

    def arrays(self) -> list[torch.Tensor]:
        """Everything that a step reads or writes."""
        return [getattr(self, name) for name in (*ARRAYS, *LISTS)]

    @property
    def nbytes(self) -> int:
        return 0 if self.capacity == 0 else sum(array.nbytes for array in self.arrays())


class Slab:
    """One slab of a pool: its part of the pool's arrays, which are written in place."""

    def __init__(self, pool: Pool, index: int) -> None:
        self.pool, self.index = pool, index
        self.groups, self.size, self.heads, self.capacity = pool.groups, pool.size, pool.heads, pool.capacity
        self.forms = pool.forms
        self.keys, self.values, self.retention, self.position, self.owner, self.table, self.offsets = (
            array[index] for array in pool.arrays()
        )

    def rows(self, array: torch.Tensor) -> torch.Tensor:
        """An array over slots as (groups, C, ...), without the spill slots."""
        return array.view(self.groups, self.capacity * self.size + 1, *array.shape[1:])[:, :-1]

    def adopt(self, other: Slab) -> None:
        """Take over the entries of another pool's slab, which fit.

        The groups are the same; of the slots those in use come first, so that the others may be left behind.
        """
        if not other.capacity:
            self.clear()
            return
        count = min(self.capacity, other.capacity) * self.size
        first = other.rows(other.owner).ge(self.heads).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        for name in ARRAYS:
            mine, theirs = self.rows(getattr(self, name)), other.rows(getattr(other, name))
            if name == "owner":
                mine.fill_(self.heads)
            mine[:, :count] = theirs[torch.arange(self.groups, device=first.device)[:, None], first]
        self._list()

    def clear(self) -> None:
        """Free all slots, and forget what somebody else has left there, which may not be numbers."""
        for array in (self.keys, self.values):
            array.zero_()
        self.owner.fill_(self.heads)
        self._list()

    def _list(self) -> None:
        table, offsets = listing(self.owner[None], self.heads, len(self.table))
        self.pool.take({"table": table, "offsets": offsets}, [self.index])


def resized(
    array: torch.Tensor, axis: int, count: int, sources: Sequence[int], fill: int = 0
) -> torch.Tensor:
    """An array with ``count`` slabs along ``axis``, of which the first ones are those of ``sources``."""
    shape = (*array.shape[:axis], count, *array.shape[axis + 1 :])
    new = array.new_full(shape, fill)
    for target, source in enumerate(sources):
        new.select(axis, target).copy_(array.select(axis, source))
    return new


def listing(owner: torch.Tensor, heads: int, used: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The table (..., used) and the offsets (..., heads + 1) of slabs' owners (..., n), int32."""
    wide = owner.long()
    counts = wide.new_zeros(*wide.shape[:-1], heads + 1).scatter_add_(-1, wide, torch.ones_like(wide))
    offsets = F.pad(counts[..., :-1].cumsum(-1), (1, 0)).to(torch.int32)
    return owner.argsort(dim=-1, stable=True)[..., :used].to(torch.int32), offsets
