"""A forward pass into rows of an arena: how many tokens it brings to each, and where they go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .arena import Arena
from .kernels.dispatch import append
from .row import Chunk, Row, run_gates
from .view import Chunks, ChunkView, LayerView, Places


class Reading:
    """A pass of ``tokens`` places over rows, each of which has ``counts`` real ones, the others are padding.

    These are the last ones, or the first if padding is on the ``right``. Padding is never an entry, is never
    scored and moves no clock. Rows have their slabs to themselves by now; what is written goes beyond what
    they hold, so that a pass that is broken off has changed nothing.
    """

    def __init__(
        self, arena: Arena, rows: Sequence[Row], tokens: int, counts: Sequence[int], right: bool = False
    ) -> None:
        self.arena, self.rows, self.tokens, self.counts = arena, rows, tokens, counts
        # where the real ones stand
        self.ends = [(0, n) if right else (tokens - n, tokens) for n in counts]
        self.whole = all(n == tokens for n in counts)
        # gate inputs of many tokens are large, so that they are scored at once
        self._direct = arena.gates is not None and max(counts, default=0) > arena.defer
        if arena.gates is not None:
            room = [row.waiting + n <= arena.defer for row, n in zip(rows, counts, strict=True)]
            if self._direct or not all(room):
                run_gates(rows)
        for row, n in zip(rows, counts, strict=True):
            if n:
                row.own()
        self.done = [False] * arena.shape.layers
        fits = all(row.length + n <= arena.limit for row, n in zip(rows, counts, strict=True))
        self.places: Places | None = None
        if tokens == 1 and len(rows) > 1 and fits and self.whole:
            self.places = Places(arena.pool, self.numbers(rows), arena.device)
        self._chunks = [self._chunk(row, n) for row, n in zip(rows, counts, strict=True)]
        # of several rows: where they stand, and the tokens of the layer at hand one row after another
        self._rows = None if self.places is not None else self._together()
        self._joined: ChunkView | None = None

    def _together(self) -> Chunks | None:
        """Where the rows that read stand if they are several."""
        active = [(at, row, n, first) for at, (row, n, (first, _)) in enumerate(self._each()) if n]
        if len(active) < 2:
            return None
        ends = [row.length + n for _, row, n, _ in active]
        begins = itertools.accumulate(ends, initial=0)
        return Chunks(
            [
                (row.hold.index, begin, end, n, first, at)
                for (at, row, n, first), begin, end in zip(active, begins, ends, strict=False)
            ],
            self.arena.device,
        )

    @classmethod
    def fixed(cls, arena: Arena, rows: Sequence[Row]) -> Reading:
        """A step of one token per row whose numbers are to be renewed; windows have room for it."""
        made = cls(arena, rows, 1, [1] * len(rows))
        made.places = made.places or Places(arena.pool, cls.numbers(rows), arena.device)
        # a row's slab is free when nobody knows the row any more
        made.rows, made.counts, made.ends, made._chunks, made._rows = (), (), [], [], None
        return made

    @staticmethod
    def numbers(rows: Sequence[Row]) -> torch.Tensor:
        """Of a step of one token per row, as :class:`Places` has them, (6, R) on the host."""
        return torch.tensor(
            [
                [row.hold.index for row in rows],
                [row.length for row in rows],
                [row.length + 1 for row in rows],
                [row.waiting for row in rows],
                [row.seen for row in rows],
                [row.next for row in rows],
            ]
        )

    def _chunk(self, row: Row, count: int) -> Chunk | None:
        """Room for tokens that are too many for the window, which come to stand behind what it holds."""
        end, shape = row.length + count, self.arena.shape
        if end <= self.arena.limit or not count:
            return None
        scores = None
        if self.arena.gates is not None:
            scores = torch.zeros(shape.layers, shape.kv_heads, end, device=self.arena.device)
            if row.scored:
                scores[:, :, : row.scored] = row.scores(row.scored)
        return Chunk(shape.layers, scores)

    # ------------------------------------------------------------------ layer by layer

    def observe(self, layer: int, x: torch.Tensor) -> None:
        """Take in the attention inputs (R, T, hidden) of tokens whose keys come next."""
        arena = self.arena
        if arena.gates is None:
            return
        if self._direct:
            self._score(layer, x)
            return
        inputs = arena.recent.reserve_inputs(x.dtype)[layer]
        if self.places is not None:
            inputs.index_put_((self.places.slabs, self.places.waiting), x[:, 0])
            return
        for at, (row, n, (begin, end)) in enumerate(self._each()):
            inputs[row.hold.index, row.waiting : row.waiting + n] = x[at, begin:end]

    def _score(self, layer: int, x: torch.Tensor) -> None:
        """log β of this layer's new tokens, in one call."""
        real = [x[at, begin:end] for at, (begin, end) in enumerate(self.ends)]
        log_beta = self.arena.gate(layer, x if len(real) == 1 and self.whole else torch.cat(real)[None])
        for (row, n, _), chunk, own in zip(
            self._each(), self._chunks, log_beta[0].split(list(self.counts)), strict=True
        ):
            if n:
                end = row.length + n
                scores = row.scores(end) if chunk is None or chunk.log_beta is None else chunk.log_beta
                scores[layer, :, row.length : end] = own.T

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys (R, H, T, Dk) and values (R, H, T, Dv).

        Returns all newest ones of a row that is alone, (1, H, r, D), else the new ones.
        """
        recent, limit = self.arena.recent, self.arena.limit
        if self.places is not None:
            recent.reserve(self.places.most, limit, keys, values)
            append(keys, values, self.places.slabs, self.places.length, *recent.layer(layer))
            self.done[layer] = True
            return keys, values
        if self._rows is not None:
            self._append_rows(layer, keys, values, self._rows)
            self.done[layer] = True
            return keys, values
        for at, (row, n, (begin, end)) in enumerate(self._each()):
            if not n:
                continue
            real = slice(at, at + 1), slice(None), slice(begin, end)
            pair = keys[real], values[real]
            chunk = self._chunks[at]
            if chunk is None:
                self._put(layer, row, n, *pair)
            else:
                old = row.newest(layer, 0, row.length) if row.length else [a[:, :, :0] for a in pair]
                # a copy also of what is new, which may be part of a larger array
                joined = [torch.cat(parts, 2) for parts in zip(old, pair, strict=True)]
                chunk.keys[layer], chunk.values[layer] = joined
        self.done[layer] = True
        return self._newest(layer, 0) if len(self.rows) == 1 and self.counts[0] else (keys, values)

    def _append_rows(self, layer: int, keys: torch.Tensor, values: torch.Tensor, chunks: Chunks) -> None:
        """Of several rows: what they hold and what is new stands together, one row after another."""
        parts: list[tuple[torch.Tensor, ...]] = []
        for at, (row, n, (begin, end)) in enumerate(self._each()):
            if n and row.length:
                parts.append(row.newest(layer, 0, row.length))
            if n:
                parts.append(tuple(a[at : at + 1, :, begin:end] for a in (keys, values)))
        joined = [torch.cat(side, 2) for side in zip(*parts, strict=True)]
        self._joined = ChunkView(self.arena.pool, layer, joined[0], joined[1], chunks)
        active = [at for at, n in enumerate(self.counts) if n]
        for at, (_, begin, length, tokens, _, _) in zip(active, chunks.numbers, strict=True):
            own = tuple(a[:, :, begin : begin + length] for a in joined)
            row, chunk = self.rows[at], self._chunks[at]
            if chunk is not None:
                chunk.keys[layer], chunk.values[layer] = own
                continue
            self._put(layer, row, tokens, *(part[:, :, length - tokens :] for part in own))

    def _put(self, layer: int, row: Row, count: int, *pair: torch.Tensor) -> None:
        """New keys and values behind those in a row's window."""
        recent, end = self.arena.recent, row.length + count
        recent.reserve(end, self.arena.limit, *pair)
        for place, own in zip(recent.slices(layer, row.hold.index, row.length, end), pair, strict=True):
            place.copy_(own)

    def _newest(self, layer: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        row, chunk = self.rows[at], self._chunks[at]
        if chunk is not None:
            return chunk.keys[layer], chunk.values[layer]
        return self.arena.recent.slices(layer, row.hold.index, 0, row.length + self.counts[at])

    def views(self, layer: int) -> list[tuple[slice, slice, LayerView]]:
        """What a layer attends to, after :meth:`append`: rows, their real places, and their view."""
        pool = self.arena.pool
        if self.places is not None:
            keys, values = self.arena.recent.layer(layer)
            return [(slice(None), slice(0, 1), LayerView(pool, 0, layer, keys, values, self.places))]
        return [
            (
                slice(at, at + 1),
                slice(*ends),
                LayerView(pool, row.hold.index, layer, *self._newest(layer, at)),
            )
            for at, (row, n, ends) in enumerate(self._each())
            if n
        ]

    def chunks(self, layer: int) -> ChunkView | None:
        """What several rows' chunks attend to, after :meth:`append`; None where a row or a step is alone."""
        assert self._joined is None or self._joined.layer == layer
        return self._joined

    def _each(self) -> zip[tuple[Row, int, tuple[int, int]]]:
        return zip(self.rows, self.counts, self.ends, strict=True)

    def positions(self, places: int) -> torch.Tensor | None:
        """Positions (R, T) of the tokens; None if all rows stand where their cache does, at ``places``."""
        first = [row.seen - begin for row, _, (begin, _) in self._each()]
        if all(own == places for own in first):
            return None
        device = self.arena.device
        start = torch.tensor(first).to(device, non_blocking=True)
        return (start[:, None] + torch.arange(self.tokens, device=device)).clamp_(min=0)

    # ------------------------------------------------------------------ its end

    def commit(self) -> None:
        """The tokens are part of their rows."""
        for (row, n, _), chunk in zip(self._each(), self._chunks, strict=True):
            if n:
                row.tell_reach(n)
                row.seen += n
                row.length += n
                row.scored = row.length if self._direct else row.scored
                row.chunk = chunk
