"""One layer's newest tokens: a dense rectangle of entries whose fate is not decided yet."""

from __future__ import annotations

from collections.abc import Callable

import torch

STEP = 256


class Recent:
    """Keys and values of the last ``length`` tokens, (R, H, length, D), with what a later selection needs.

    Gates are deferred: their inputs wait until ``defer`` tokens have come, then one call serves them all, so
    that a decoded token does not pay for reading the gates' weights. It serves all layers too, so
    whoever holds them makes it between passes. A longer chunk is scored at once, for its inputs are large.

    Attributes get new values and are not changed in place, so that whoever holds the old ones can go back to
    them; keys and values are written beyond the first ``length`` tokens only.
    """

    def __init__(self, buffer: int, defer: int, gate: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        self._buffer, self._defer, self._gate = buffer, defer, gate
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._inputs: list[torch.Tensor] = []
        self._log_beta: list[torch.Tensor] = []

    @property
    def keys(self) -> torch.Tensor:
        assert self._keys is not None
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor:
        assert self._values is not None
        return self._values[:, :, : self.length]

    def observe(self, x: torch.Tensor) -> None:
        """Take in the attention inputs (R, T, hidden) of tokens whose keys come next."""
        if self._gate is not None:
            self._inputs = [*self._inputs, x]
            if x.shape[1] > self._defer:
                self.run_gate()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in keys (R, H, T, Dk) and values (R, H, T, Dv)."""
        end = self.length + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            # a chunk gets what it needs; single tokens get room in steps, at most the buffer
            room = max(end, min(self._buffer, -(-end // STEP) * STEP))
            wide_keys = _widened(self._keys, self.length, keys, room)
            wide_values = _widened(self._values, self.length, values, room)
            self._keys, self._values = wide_keys, wide_values
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end

    def reserve(self, room: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for ``room`` tokens like ``keys`` and ``values`` (R, H, ·, D): until then nothing moves."""
        if self._keys is None or self._values is None or self._keys.shape[2] < room:
            wide = _widened(self._keys, self.length, keys, room)
            self._values = _widened(self._values, self.length, values, room)
            self._keys = wide

    def storage(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with all their room, (R, H, room, D)."""
        assert self._keys is not None and self._values is not None
        return self._keys, self._values

    def advance(self, x: torch.Tensor) -> None:
        """One token whose keys and values (R, H, 1, D) stand in the storage already; ``x`` (R, 1, hidden)."""
        self.observe(x)
        self.length += 1

    @property
    def waiting(self) -> int:
        """Tokens whose gate inputs wait."""
        return sum(x.shape[1] for x in self._inputs)

    def log_beta(self) -> torch.Tensor:
        """log β (R, H, length); runs the gate over what still waits."""
        self.run_gate()
        if len(self._log_beta) > 1:
            self._log_beta = [torch.cat(self._log_beta, 2)]
        return self._log_beta[0]

    def cut(self, length: int) -> None:
        """Forget all but the oldest ``length`` tokens, also gate inputs whose keys never came."""
        self.length = length
        observed = self.waiting + sum(b.shape[2] for b in self._log_beta)
        self._inputs, count = _shortened(self._inputs, observed - length, dim=1)
        self._log_beta, _ = _shortened(self._log_beta, count, dim=2)

    def forget_oldest(self, count: int) -> None:
        """Drop the oldest ``count`` tokens, whose entries have been decided upon."""
        if count == self.length:
            wide = self._keys is not None and self._keys.shape[2] > max(1, self._buffer)
            if wide:
                self._keys = self._values = None
            self._inputs, self._log_beta = [], []
        else:
            # copies, so that the memory of the others goes
            self._keys, self._values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
            self._log_beta = [self.log_beta()[:, :, count:].clone()] if self._gate else []
        self.length -= count

    def restore(self, keys: torch.Tensor, values: torch.Tensor, log_beta: torch.Tensor | None) -> None:
        """Replace everything; keys and values (R, H, T, D), log β (R, H, T)."""
        self._keys, self._values, self.length = keys, values, keys.shape[2]
        self._inputs, self._log_beta = [], [] if log_beta is None else [log_beta]

    def run_gate(self) -> None:
        """Score what waits, if anything does."""
        if self._inputs and self._gate:
            self.scored(self._gate(self.inputs()))

    def inputs(self) -> torch.Tensor:
        """The gate inputs that wait, (R, waiting, hidden)."""
        return self._inputs[0] if len(self._inputs) == 1 else torch.cat(self._inputs, 1)

    def scored(self, log_beta: torch.Tensor) -> None:
        """Take in log β (R, waiting, H) of the inputs that wait."""
        # at once: what was scored no longer waits
        vars(self).update(_log_beta=[*self._log_beta, log_beta.transpose(1, 2)], _inputs=[])

    def arrays(self) -> list[torch.Tensor]:
        """Everything to be counted."""
        held = [a for a in (self._keys, self._values) if a is not None]
        return [*held, *self._inputs, *self._log_beta]


def _widened(old: torch.Tensor | None, length: int, new: torch.Tensor, room: int) -> torch.Tensor:
    wide = new.new_zeros(*new.shape[:2], room, new.shape[3])
    if old is not None:
        wide[:, :, :length] = old[:, :, :length]
    return wide


def _shortened(parts: list[torch.Tensor], count: int, dim: int) -> tuple[list[torch.Tensor], int]:
    """Parts without the last ``count`` places along ``dim``, and how many are still to go."""
    parts = list(parts)
    while count > 0 and parts:
        last = parts.pop()
        size = last.shape[dim]
        if size > count:
            parts.append(last.narrow(dim, 0, size - count))
        count -= min(size, count)
    return parts, count
