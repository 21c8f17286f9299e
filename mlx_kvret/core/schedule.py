"""When the newest tokens of a cache are decided upon, and the room that takes: arithmetic of the host.

The number of entries follows from that of tokens, so no backend waits for its device to know what is due.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import EvictionConfig
from .types import Ints, Mask

# entries of rows that select together; each takes some 60 bytes meanwhile
TOGETHER = 1 << 22


@dataclass(frozen=True)
class Move:
    """What is to be done: the oldest ``tokens`` of the newest ones go to the pool, made for ``capacity``.

    ``due`` (groups,) tells which groups select first; ``capacity`` is in tokens per head.
    """

    tokens: int
    due: Mask
    capacity: int


class Schedule:
    """Counts of pooled entries of one sequence, in ``groups`` groups of ``size`` competing heads.

    ``soonest`` newest tokens at least there must be for anything to be due, which costs nothing to ask.
    """

    def __init__(self, config: EvictionConfig, groups: int, size: int) -> None:
        self.config, self.size = config, size
        self.counts = np.zeros(groups, np.int64)

    @property
    def counts(self) -> Ints:
        """Entries of each group in the pool, (groups,)."""
        return self._counts

    @counts.setter
    def counts(self, counts: Ints) -> None:
        full = (self.config.budget + self.config.buffer) * self.size
        due = -(-(full - int(counts.max())) // self.size)
        self._counts, self.soonest = counts, max(1, min(due, self.config.buffer))

    @property
    def most(self) -> int:
        """The largest capacity of the pool, in tokens per head.

        Groups in step never keep more than M. A threshold puts them out of step, and one that is not due when
        another is must find room for its newest tokens.
        """
        apart = self.config.threshold is not None and len(self.counts) > 1
        return self.config.budget + (self.config.buffer if apart else 0)

    def next(self, seen: int, recent: int) -> Move | None:
        """What is due after ``seen`` tokens, of which the last ``recent`` are not in the pool, or None."""
        if recent < self.soonest or self.config.policy == "full":
            return None
        size = self.size
        due = self.counts + recent * size >= (self.config.budget + self.config.buffer) * size
        if due.any():
            return Move(recent, due, self.most)
        held = int(-(-self.counts.max() // size))
        tokens = min(recent, self.most - held)
        if recent < self.config.buffer or tokens <= 0:
            return None
        return Move(tokens, due, held + tokens)

    def done(self, move: Move, start: int, counts: Ints | None = None) -> None:
        """Note a move of the tokens from ``start`` on; ``counts`` where a threshold decided them."""
        if counts is not None:
            self.counts = np.asarray(counts, np.int64)
        else:
            added = self.counts + move.tokens * self.size
            self.counts = np.where(move.due, self.config.budget * self.size, added)


def grown(needed: int, capacity: int, most: int) -> int:
    """To how many tokens per head a pool of ``capacity`` grows that must have room for ``needed``.

    It doubles, so that a long prompt moves it seldom, but to no more than the ``most`` there will ever be.
    """
    return max(needed, min(most, 2 * capacity))


def together(entries: int, shared: bool) -> int:
    """How many rows select at once that have so many ``entries`` each, with their newest tokens."""
    # several ranks, whose pools differ, must all ask of the same row
    return 1 if shared else max(1, TOGETHER // entries)
