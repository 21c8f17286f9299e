"""One layer's newest tokens: a dense rectangle of entries whose fate is not decided yet."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

STEP = 256


class Recent:
    """Keys and values of the last ``length`` tokens, (1, H, length, D), with what a later selection needs.

    Gates are deferred: their inputs wait until ``defer`` tokens have come, then one call serves them all, so
    that a decoded token does not pay for reading the gates' weights.

    Attributes get new values and are never changed in place, arrays too, so that whoever holds the old ones
    can go back to them. MLX writes where the old values stand once nobody does.
    """

    def __init__(self, buffer: int, defer: int, gate: Callable[[mx.array], mx.array] | None) -> None:
        self._buffer, self._defer, self._gate = buffer, defer, gate
        self.length = 0
        self.fetched: tuple[mx.array, mx.array] | None = None
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self._inputs: list[mx.array] = []
        self._log_beta: list[mx.array] = []
        self._fresh: list[mx.array] = []

    @property
    def keys(self) -> mx.array:
        assert self._keys is not None
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> mx.array:
        assert self._values is not None
        return self._values[:, :, : self.length]

    def observe(self, x: mx.array) -> None:
        """Take in the attention inputs (T, hidden) of tokens whose keys come next."""
        if self._gate is None:
            return
        self._inputs = [*self._inputs, x]
        if sum(len(x) for x in self._inputs) >= self._defer:
            self._run_gate()

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Take in keys (1, H, T, Dk) and values (1, H, T, Dv)."""
        end = self.length + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            # a chunk gets what it needs; single tokens get room in steps, at most the buffer
            room = max(end, min(self._buffer, -(-end // STEP) * STEP))
            self._keys = _widened(self._keys, self.length, keys, room)
            self._values = _widened(self._values, self.length, values, room)
        self._keys = _written(self._keys, self.length, keys)
        self._values = _written(self._values, self.length, values)
        self.length = end

    def fetch(self) -> tuple[mx.array, mx.array]:
        """Keys and values (1, H, length, D), remembered as ``fetched`` until they change."""
        self.fetched = self.keys, self.values
        return self.fetched

    def release(self) -> None:
        """Forget what was fetched, which would hold on to the memory of a whole chunk."""
        self.fetched = None

    def fresh(self) -> list[mx.array]:
        """log β that the gate has been asked for since the last call; until computed they hold its inputs."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def log_beta(self) -> mx.array:
        """log β (H, length); runs the gate over what still waits."""
        self._run_gate()
        if len(self._log_beta) > 1:
            self._log_beta = [mx.concatenate(self._log_beta, axis=1)]
        return self._log_beta[0]

    def trim(self, count: int) -> None:
        """Forget the newest ``count`` tokens."""
        self.release()
        self.length -= count
        self._inputs, count = _shortened(self._inputs, count, axis=0)
        self._log_beta, _ = _shortened(self._log_beta, count, axis=1)

    def forget_oldest(self, count: int) -> None:
        """Drop the oldest ``count`` tokens, whose entries have been decided upon."""
        self.release()
        if count == self.length:
            wide = self._keys is not None and self._keys.shape[2] > max(1, self._buffer)
            if wide:
                self._keys = self._values = None
            self._log_beta = []
        else:
            # copies: views would hold on to the memory of a whole chunk
            self._keys = mx.contiguous(self.keys[:, :, count:])
            self._values = mx.contiguous(self.values[:, :, count:])
            self._log_beta = [part[:, count:] for part in ([self.log_beta()] if self._gate else [])]
        self.length -= count

    def restore(self, keys: mx.array, values: mx.array, log_beta: mx.array | None) -> None:
        """Replace everything; keys and values (1, H, T, D), log β (H, T)."""
        self._keys, self._values, self.length = keys, values, keys.shape[2]
        self._inputs, self._log_beta = [], [] if log_beta is None else [log_beta]

    def _run_gate(self) -> None:
        if self._inputs and self._gate:
            x = self._inputs[0] if len(self._inputs) == 1 else mx.concatenate(self._inputs)
            scored = self._gate(x).T
            # at once: what was scored no longer waits
            vars(self).update(_log_beta=[*self._log_beta, scored], _fresh=[*self._fresh, scored], _inputs=[])

    def arrays(self) -> list[mx.array]:
        """Everything to be counted or evaluated."""
        held = [a for a in (self._keys, self._values) if a is not None]
        return [*held, *self._inputs, *self._log_beta]


def _widened(old: mx.array | None, length: int, new: mx.array, room: int) -> mx.array:
    wide = mx.zeros((*new.shape[:2], room - length, new.shape[3]), new.dtype)
    return wide if old is None or length == 0 else mx.concatenate([old[:, :, :length], wide], axis=2)


def _written(wide: mx.array, start: int, new: mx.array) -> mx.array:
    wide = wide[...]  # an array of its own on the same values
    wide[:, :, start : start + new.shape[2]] = new
    return wide


def _shortened(parts: list[mx.array], count: int, axis: int) -> tuple[list[mx.array], int]:
    """Parts without the last ``count`` places along ``axis``, and how many are still to go."""
    parts = list(parts)
    while count and parts:
        last = parts.pop()
        size = last.shape[axis]
        if size > count:
            parts.append(last[: size - count] if axis == 0 else last[:, : size - count])
        count -= min(size, count)
    return parts, count
