"""The kept entries of all layers and sequences: slots that are never moved, only refilled.

Flat heads (row·L·H + layer·H + h, ``row`` being the sequence of a batch) compete in groups of ``size``
consecutive ones. A group owns C slots and one *spill* slot after them, which takes the writes nobody wants,
so that a scatter has a fixed shape whatever survives. What belongs to which head is told by ``owner``;
``table`` and ``offsets`` list each head's slots (CSR).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mlx_kvret.core.types import Ints


@dataclass
class Lookup:
    """Slots by head: those of flat head f are ``table[offsets[f]:offsets[f + 1]]``, in any order."""

    table: torch.Tensor
    offsets: torch.Tensor
    host_offsets: Ints | None = None

    def on_host(self) -> Ints:
        """``offsets`` as numpy; waits for the device once after a compaction."""
        if self.host_offsets is None:
            self.host_offsets = self.offsets.cpu().numpy()
        return self.host_offsets


class Pool:
    """Slots of ``groups`` groups of ``size`` heads, ``capacity`` tokens per head in each.

    ``keys`` (slots, Dk), ``values`` (slots, Dv), ``retention`` (slots,) float32, ``position`` (slots,) int32
    and ``owner`` (slots,) int32, the flat head, or ``heads`` where the slot is free.
    """

    def __init__(self, groups: int, size: int, device: torch.device) -> None:
        self.groups, self.size, self.heads = groups, size, groups * size
        self.capacity = 0
        self.keys = self.values = torch.zeros(groups, 0, device=device)
        self.retention = torch.zeros(groups, device=device)
        self.position = torch.zeros(groups, dtype=torch.int32, device=device)
        self.owner = torch.full((groups,), self.heads, dtype=torch.int32, device=device)
        self.lookup = Lookup(*self._listed(self.owner, 0))

    def grow(self, capacity: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for ``capacity`` tokens per head, in the types and widths of ``keys`` and ``values``."""
        if self.capacity == 0:
            new = ((len(self.owner), a.shape[-1]) for a in (keys, values))
            made = (a.new_zeros(size) for a, size in zip((keys, values), new, strict=True))
            vars(self).update(zip(("keys", "values"), made, strict=True))
        # all new arrays exist before an old one goes, so that being broken off changes nothing
        self.restore(capacity, [self._widened(array, capacity) for array in self.arrays()])

    def _widened(self, array: torch.Tensor, capacity: int) -> torch.Tensor:
        old = array.view(self.groups, self.capacity * self.size + 1, *array.shape[1:])
        fill = self.heads if array is self.owner else 0
        wide = old.new_full((self.groups, capacity * self.size + 1, *array.shape[1:]), fill)
        # new slots go before the old ones, so that the spill slot stays the last
        wide[:, (capacity - self.capacity) * self.size :] = old
        return wide.view(-1, *array.shape[1:])

    def rows(self, array: torch.Tensor) -> torch.Tensor:
        """An array over slots as (groups, C, ...), without the spill slots."""
        return array.view(self.groups, self.capacity * self.size + 1, *array.shape[1:])[:, :-1]

    def destinations(self, keep: torch.Tensor, survives: torch.Tensor) -> torch.Tensor:
        """Slots for newcomers: the n-th survivor of a group fills the group's n-th hole, others are spilled.

        ``keep`` (groups, C) marks entries that stay, ``survives`` (groups, N) newcomers; returns (groups, N)
        flat slot ids, int64.
        """
        slots = self.capacity * self.size
        local = torch.arange(slots, device=keep.device).expand_as(keep)
        # each hole is written to the place of its rank, and what is none behind them
        rank = torch.where(keep, slots, (~keep).cumsum(1) - 1)
        holes = torch.full_like(rank, slots)
        holes = torch.nn.functional.pad(holes, (0, 1)).scatter_(1, rank, local)
        rank = (survives.cumsum(1) - 1).clamp(0, slots - 1)
        place = torch.where(survives, holes.gather(1, rank), slots)
        return place + torch.arange(self.groups, device=keep.device)[:, None] * (slots + 1)

    def admit(
        self,
        keep: torch.Tensor,
        slots: torch.Tensor,
        survives: torch.Tensor,
        retention: torch.Tensor,
        position: torch.Tensor,
        head: torch.Tensor,
    ) -> None:
        """Free what ``keep`` (groups, C) drops and enter newcomers, all (groups, N), into ``slots``.

        Keys and values follow with :meth:`fill`.
        """
        self.take(self.admitted(keep, slots, survives, retention, position, head))

    def admitted(
        self,
        keep: torch.Tensor,
        slots: torch.Tensor,
        survives: torch.Tensor,
        retention: torch.Tensor,
        position: torch.Tensor,
        head: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """What :meth:`admit` makes of ``owner``, ``retention``, ``position``, ``table`` and ``offsets``."""
        owner, slots = self.owner.clone(), slots.flatten()
        self.rows(owner).masked_fill_(~keep, self.heads)
        new = torch.where(survives, head, self.heads), retention, position
        filled = {
            name: array.index_copy(0, slots, values.to(array.dtype).flatten())
            for (name, array), values in zip(
                {"owner": owner, "retention": self.retention, "position": self.position}.items(),
                new,
                strict=True,
            )
        }
        table, offsets = self._listed(filled["owner"], self.capacity)
        return filled | {"table": table, "offsets": offsets}

    def take(self, arrays: dict[str, torch.Tensor]) -> None:
        """Put :meth:`admitted` arrays where a captured step reads them; twice is as good as once."""
        places = {"table": self.lookup.table, "offsets": self.lookup.offsets}
        for name, array in arrays.items():
            (places[name] if name in places else getattr(self, name)).copy_(array)
        self.lookup = Lookup(self.lookup.table, self.lookup.offsets)

    def fill(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write ``keys`` (N, Dk) and ``values`` (N, Dv) into ``slots`` (N,), in place."""
        self.keys[slots] = keys
        self.values[slots] = values

    def _listed(self, owner: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The table and the offsets of a lookup."""
        wide = owner.long()
        counts = wide.new_zeros(self.heads + 1).scatter_add_(0, wide, torch.ones_like(wide))
        offsets = torch.nn.functional.pad(counts[:-1].cumsum(0), (1, 0)).to(torch.int32)
        used = self.groups * capacity * self.size
        return owner.argsort(stable=True)[:used].to(torch.int32), offsets

    def arrays(self) -> list[torch.Tensor]:
        """Everything to be saved or counted."""
        return [self.keys, self.values, self.retention, self.position, self.owner]

    def restore(self, capacity: int, arrays: Sequence[torch.Tensor]) -> None:
        """Take over :meth:`arrays` of that capacity, all at once."""
        names = ("keys", "values", "retention", "position", "owner")
        lookup = Lookup(*self._listed(arrays[-1], capacity))
        vars(self).update(zip(names, arrays, strict=True), capacity=capacity, lookup=lookup)

    def copy(self) -> Pool:
        """A pool of its own with the same entries."""
        twin = Pool(self.groups, self.size, self.owner.device)
        twin.restore(self.capacity, [array.clone() for array in self.arrays()])
        return twin

    @property
    def nbytes(self) -> int:
        if self.capacity == 0:
            return 0
        return sum(a.nbytes for a in [*self.arrays(), self.lookup.table, self.lookup.offsets])
