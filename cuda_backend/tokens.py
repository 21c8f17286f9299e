"""Tokens read from the device while it goes on: through pinned memory, behind an event of their own."""

from __future__ import annotations

import torch

# told of two steps at most at a time: the one that is looked at, and the next one
_TURNS = 2


class Told:
    """Reads tokens (R,) of one step after the other: nothing is allocated, no later work is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._held: list[torch.Tensor] = [torch.empty(0, dtype=torch.long)] * _TURNS
        self._events = [torch.cuda.Event() if self._cuda else None for _ in range(_TURNS)]
        self._turn = 0

    def ask(self, tokens: torch.Tensor) -> int:
        """Have the device tell tokens when it has them; returns what to :meth:`get` them by."""
        turn = self._turn = (self._turn + 1) % _TURNS
        if len(self._held[turn]) < len(tokens):
            self._held[turn] = torch.empty(len(tokens), dtype=torch.long, pin_memory=self._cuda)
        self._held[turn][: len(tokens)].copy_(tokens, non_blocking=True)
        if (event := self._events[turn]) is not None:
            event.record(torch.cuda.current_stream(tokens.device))
        return turn

    def get(self, turn: int, count: int) -> list[int]:
        """The first ``count`` tokens that were asked for with this ``turn``."""
        if (event := self._events[turn]) is not None:
            event.synchronize()
        found: list[int] = self._held[turn][:count].tolist()
        return found
