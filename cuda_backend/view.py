"""What one layer attends to: the pool's slots of its KV heads, and its newest tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mlx_kvret.core.types import Ints

from .pool import Pool


class Places:
    """Where a step of one token per row finds its numbers: rows stand in slabs and have clocks of their own.

    ``slabs``, ``length`` before the step, ``after`` it, ``waiting`` (where its gate input goes), ``seen`` and
    ``next`` (its rotary position) are (R,) int64 on the device, parts of one array so that one copy renews
    them. ``most`` is the largest of ``after``, which the host knows.
    """

    def __init__(self, pool: Pool, numbers: torch.Tensor, device: torch.device) -> None:
        self.pool = pool
        self._numbers = torch.zeros_like(numbers, device=device)
        self.slabs, self.length, self.after, self.waiting, self.seen, self.next = self._numbers
        self.set(numbers)

    def set(self, numbers: torch.Tensor) -> None:
        """Renew the numbers (6, R), which the host knows, without waiting for the device."""
        self.host_slabs, self.most = numbers[0].numpy(), int(numbers[2].max())
        for name in ("host_offsets", "visible"):
            vars(self).pop(name, None)
        self._numbers.copy_(numbers, non_blocking=True)

    def move_on(self) -> None:
        """The numbers of the step after this one, as far as steps alone decide them."""
        self._numbers[1:].add_(1)
        self.most += 1
        vars(self).pop("visible", None)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Which of the ``most`` newest places of a window are in use, (R, 1, most)."""
        return (torch.arange(self.most, device=self.after.device) < self.after[:, None])[:, None]

    @cached_property
    def host_offsets(self) -> Ints:
        """Offsets (R, L·H + 1) of the rows; waits for the device once after a compaction."""
        return np.stack([self.pool.host_offsets(slab) for slab in self.host_slabs.tolist()])


class Chunks:
    """Where rows that read chunks stand: (R, 6) numbers of the host, renewed for each pass.

    Of each: slab, where its newest tokens begin among those of all rows, how many they are, how many of them
    ask, where these begin among the queries' places, and the queries' row.
    """

    def __init__(self, numbers: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self.numbers, self.most = list(numbers), max(own[3] for own in numbers)
        self.device = torch.tensor(self.numbers).to(device, non_blocking=True)


@dataclass(frozen=True)
class ChunkView:
    """Chunks of several rows in a layer: ``keys`` and ``values`` (1, H, n, D), one row after another."""

    pool: Pool
    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    rows: Chunks

    def views(self) -> Iterator[tuple[slice, slice, LayerView]]:
        """Row by row: its place and its tokens' places among the queries, and what it attends to."""
        for slab, begin, length, tokens, first, row in self.rows.numbers:
            keys, values = (a[:, :, begin : begin + length] for a in (self.keys, self.values))
            yield (
                slice(row, row + 1),
                slice(first, first + tokens),
                LayerView(self.pool, slab, self.layer, keys, values),
            )


@dataclass(frozen=True)
class LayerView:
    """What a layer attends to: pool slots of its heads and its newest tokens.

    Of one row they are ``keys`` and ``values`` (1, H, r, D), and ``slab`` is its slab. Of many rows these are
    the windows of all slabs (S, H, room, D), and ``rows`` tells where in them rows stand.
    """

    pool: Pool
    slab: int
    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    rows: Places | None = None

    @property
    def count(self) -> int:
        return 1 if self.rows is None else len(self.rows.host_slabs)

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def first(self) -> int:
        """The layer's first flat head."""
        return self.layer * self.kv_heads

    def kept_ranges(self) -> Ints:
        """Begin and end of each row's and KV head's slots in its slab's table, (2, R, H)."""
        offsets = self.pool.host_offsets(self.slab)[None] if self.rows is None else self.rows.host_offsets
        own = offsets[:, self.first : self.first + self.kv_heads + 1]
        return np.stack([own[:, :-1], own[:, 1:]])

    def lengths(self) -> Ints:
        """Kept entries of each row and KV head, (R·H,)."""
        begin, end = self.kept_ranges()
        return (end - begin).reshape(-1)

    def kept(self, which: Ints, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Kept keys and values of n of the R·H heads, padded to ``width``, and which of them are real.

        Returns (n, width, Dk), (n, width, Dv) and a mask (n, width).
        """
        pool, device = self.pool, self.keys.device
        slabs = np.full(1, self.slab) if self.rows is None else self.rows.host_slabs
        slab = slabs[which // self.kv_heads]
        used = pool.table.shape[1]
        begin, end = self.kept_ranges().reshape(2, -1)[:, which] + slab * used
        # what is not real is of the head or at least the row, for others' numbers may be none
        last = np.maximum(end - 1, slab * used)
        host = torch.from_numpy(np.stack([begin, end, last, slab * pool.slots]))
        begin, end, last, base = host.to(device)[..., None]
        index = begin + torch.arange(width, device=device)
        real = index < end
        slots = pool.table.view(-1)[torch.minimum(index, last)] + base
        keys, values = (a.flatten(0, 1)[slots] for a in (pool.keys, pool.values))
        return pool.read(0, keys), pool.read(1, values), real

    def newest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (R, H, r, D) of the newest tokens, of each row as many as of the longest."""
        if self.rows is None:
            return self.keys, self.values
        used = slice(0, self.rows.most)
        return self.keys[:, :, used][self.rows.slabs], self.values[:, :, used][self.rows.slabs]

    def visible(self, tokens: int, block: torch.Tensor | None = None) -> torch.Tensor:
        """Which of the newest tokens the last ``tokens`` see, (R or 1, tokens, r).

        ``block`` (R or 1, tokens, tokens) tells it of those themselves; they see what came before else.
        """
        device = self.keys.device
        if self.rows is not None:
            return self.rows.visible
        length = self.keys.shape[2]
        if block is not None:
            return torch.nn.functional.pad(block, (length - tokens, 0), value=True)
        own = torch.arange(length - tokens, length, device=device)[:, None]
        return (torch.arange(length, device=device) <= own)[None]
