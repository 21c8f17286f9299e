"""The newest tokens of every sequence of an arena: dense windows of entries whose fate is not decided yet."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

STEP = 256
Pair = tuple[mx.array, mx.array]


class Recent:
    """Of each layer the keys and values of all slabs' newest tokens, (slabs, H, room, D).

    How many of a slab's places are filled is told by the row that holds it. Windows have room for at most
    ``buffer`` tokens: what a longer chunk leaves is held by its row. Lists get new arrays, which are never
    changed in place, so that whoever holds the old ones can go back to them; MLX writes where the old values
    stand once nobody does.
    """

    def __init__(self, layers: int, buffer: int, slabs: int = 1) -> None:
        self.slabs, self.buffer = slabs, buffer
        self.keys: list[mx.array | None] = [None] * layers
        self.values: list[mx.array | None] = [None] * layers

    def append(self, layer: int, slab: int, start: int, keys: mx.array, values: mx.array) -> None:
        """Put keys (1, H, T, Dk) and values (1, H, T, Dv) of a slab's tokens from place ``start`` on."""
        self.append_block(layer, slice(slab, slab + 1), start, keys, values)

    def append_block(self, layer: int, slabs: slice, start: int, keys: mx.array, values: mx.array) -> None:
        """Of neighbouring slabs (R, H, T, D), all from the same place on."""
        end = start + keys.shape[2]
        for held, new in ((self.keys, keys), (self.values, values)):
            wide = self._roomy(held[layer], end, new)
            wide[slabs, :, start:end] = new
            held[layer] = wide

    def put(self, layer: int, slab: int, keys: mx.array, values: mx.array) -> None:
        """Have a slab hold just these, (1, H, T, D), which may be a part of what it holds."""
        if self.slabs == 1:
            self.keys[layer], self.values[layer] = mx.contiguous(keys), mx.contiguous(values)
        else:
            # copies: MLX writes in place only where nobody looks on
            self.append(layer, slab, 0, keys + 0, values + 0)

    def append_rows(
        self, layer: int, slabs: mx.array, starts: mx.array, end: int, keys: mx.array, values: mx.array
    ) -> None:
        """One token (R, H, 1, D) of each of several slabs (R,), at its place (R,), all before ``end``."""
        for held, new in ((self.keys, keys), (self.values, values)):
            wide = self._roomy(held[layer], end, new)
            wide[slabs, :, starts] = new[:, :, 0]
            held[layer] = wide

    def window(self, layer: int, slab: int, length: int) -> Pair:
        """A slab's newest tokens: keys and values (1, H, length, D)."""
        keys, values = self.whole(layer)
        if self.slabs == 1:
            return keys[:, :, :length], values[:, :, :length]
        return keys[slab : slab + 1, :, :length], values[slab : slab + 1, :, :length]

    def whole(self, layer: int) -> Pair:
        """Of all slabs, (slabs, H, room, D), filled or not."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None and values is not None
        return keys, values

    def windows(self, layer: int, slabs: list[int], length: int) -> Pair:
        """Of several slabs, (R, H, length, D), filled or not."""
        keys, values = self.whole(layer)
        first, last = slabs[0], slabs[-1] + 1
        if slabs == list(range(first, last)):
            return keys[first:last, :, :length], values[first:last, :, :length]
        index = mx.array(slabs, mx.int32)
        return keys[:, :, :length][index], values[:, :, :length][index]

    def gathered(self, rows: list[tuple[int, int]]) -> list[Pair]:
        """Keys and values (n, D) by layer of the first tokens of several slabs, each slab's heads in turn.

        ``rows`` are slabs and how many tokens of each; nothing else is read.
        """
        found = []
        index: dict[int, mx.array] = {}
        for layer in range(len(self.keys)):
            keys, values = self.whole(layer)
            heads, room = keys.shape[1:3]
            if room not in index:
                begin = np.arange(heads)[:, None] * room
                parts = [slab * heads * room + begin + np.arange(tokens) for slab, tokens in rows]
                flat = np.concatenate([part.reshape(-1) for part in parts])
                index[room] = mx.array(flat.astype(np.int64 if flat.max() >= 2**31 else np.int32))
            flat_keys, flat_values = (a.reshape(-1, a.shape[-1]) for a in (keys, values))
            found.append((flat_keys[index[room]], flat_values[index[room]]))
        return found

    def _roomy(self, held: mx.array | None, end: int, new: mx.array) -> mx.array:
        """An array of its own on the same values, with room up to ``end``."""
        if held is not None and end <= held.shape[2]:
            return held[...]
        room = max(end, min(self.buffer, -(-end // STEP) * STEP))
        wide = mx.zeros((self.slabs, new.shape[1], room, new.shape[3]), new.dtype)
        if held is not None:
            wide[:, :, : held.shape[2]] = held
        return wide

    def resized(self, kept: list[int], count: int) -> Recent:
        """Of ``count`` slabs, those of ``kept`` first."""
        made = Recent(len(self.keys), self.buffer, count)
        for held, ours in ((self.keys, made.keys), (self.values, made.values)):
            for layer, array in enumerate(held):
                if array is not None:
                    same = kept == list(range(self.slabs))
                    part = array if same else array[mx.array(kept, mx.int32)]
                    if empty := count - len(kept):
                        part = mx.concatenate([part, mx.zeros((empty, *part.shape[1:]), part.dtype)])
                    ours[layer] = part
        return made

    def take(self, slab: int, other: Recent, source: int, length: int) -> None:
        """The first ``length`` tokens of another's slab ``source`` into ``slab``, and zeros after them.

        Nothing is left of what was there: no row's padding may ever be another's NaN.
        """
        for held, given in ((self.keys, other.keys), (self.values, other.values)):
            for layer, theirs in enumerate(given):
                model = held[layer] if theirs is None else theirs
                if model is None:
                    continue
                ours = held[layer]
                room = max(length, 0 if ours is None else ours.shape[2])
                part = mx.zeros((1, model.shape[1], room, model.shape[3]), model.dtype)
                if theirs is not None:
                    part[:, :, :length] = theirs[:, :, :length][mx.array([source], mx.int32)]
                wide = self._roomy(ours, room, part)
                wide[slab : slab + 1, :, :room] = part
                held[layer] = wide

    def copy(self) -> Recent:
        """One of its own that holds the same arrays."""
        made = Recent(0, self.buffer, self.slabs)
        made.keys, made.values = list(self.keys), list(self.values)
        return made

    def arrays(self) -> list[mx.array]:
        """Everything to be counted or evaluated."""
        return [a for a in (*self.keys, *self.values) if a is not None]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())
