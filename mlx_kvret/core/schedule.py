"""When the newest tokens of a cache are decided upon, and the room that takes: arithmetic of the host.

The number of entries follows from that of tokens, so no backend waits for its device to know what is due.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import EvictionConfig
from .types import Ints, Mask


@dataclass(frozen=True)
class Move:
    """What is to be done: the oldest ``tokens`` of the newest ones go to the pool, made for ``capacity``.

    ``due`` (groups,) tells which groups select first; ``capacity`` is in tokens per head.
    """

    tokens: int
    due: Mask
    capacity: int


class Schedule:
    """Counts of pooled entries in ``rows`` sequences of ``groups`` groups of ``size`` competing heads.

    Sequences of a batch differ in ``padding`` (rows,): places before their first token, which are no entries.
    """

    def __init__(self, config: EvictionConfig, groups: int, size: int, rows: int = 1) -> None:
        self.config, self.size = config, size
        self.padding = np.zeros(rows, np.int64)
        self.counts = np.zeros(rows * groups, np.int64)

    @property
    def most(self) -> int:
        """The largest capacity of the pool, in tokens per head.

        Groups in step never keep more than M. A threshold or padding puts them out of step, and one that is
        not due when another is must find room for its newest tokens.
        """
        apart = self.config.threshold is not None or len(set(self.padding.tolist())) > 1
        return self.config.budget + (self.config.buffer if apart and len(self.counts) > 1 else 0)

    def tokens(self, start: int, end: int) -> Ints:
        """Entries per head (rows,) between two places, padding left out."""
        return np.maximum(end - np.maximum(self.padding, start), 0)

    def next(self, seen: int, recent: int) -> Move | None:
        """What is due after ``seen`` places, of which the last ``recent`` are not in the pool, or None."""
        if recent == 0 or self.config.policy == "full":
            return None
        start, size = seen - recent, self.size
        due = self.counts + self._added(start, seen) >= (self.config.budget + self.config.buffer) * size
        if due.any():
            return Move(recent, due, self.most)
        held = int(-(-self.counts.max() // size))
        tokens = min(recent, self.most - held)
        if recent < self.config.buffer or tokens <= 0:
            return None
        return Move(tokens, due, held + tokens)

    def done(self, move: Move, start: int, counts: Ints | None = None) -> None:
        """Note a move of the tokens from place ``start`` on; ``counts`` where a threshold decided them."""
        if counts is not None:
            self.counts = np.asarray(counts, np.int64)
        else:
            added = self.counts + self._added(start, start + move.tokens)
            self.counts = np.where(move.due, self.config.budget * self.size, added)

    def _added(self, start: int, end: int) -> Ints:
        """Entries per group (rows·groups,) between two places."""
        per_head = self.tokens(start, end)
        return np.repeat(per_head * self.size, len(self.counts) // len(per_head))
