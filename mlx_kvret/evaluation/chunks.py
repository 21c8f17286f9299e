"""How texts are read in an evaluation: in chunks well below the budget, so that entries go while it is read.

A text that is read in one chunk is evicted from only afterwards: where its own tokens are scored, every
policy then looks like the full cache.
"""

from __future__ import annotations

from ..core.options import whole
from .samples import Sample

LONGEST = 512


def default_chunk(budget: int) -> int:
    """Half the budget M, so that the cache never holds much more than M + B; at most 512 tokens."""
    return max(1, min(LONGEST, budget // 2))


def default_buffer(budget: int) -> int:
    """B as of :meth:`mlx_kvret.core.config.EvictionConfig.create`."""
    return max(1, budget // 8)


class Pace:
    """Tokens read at a time and B, of the same size for every policy at a budget.

    Args:
        chunk: tokens; None for :func:`default_chunk` of each budget.
        buffer: tokens per head; None for :func:`default_buffer` of each budget.
    """

    def __init__(self, chunk: int | None = None, buffer: int | None = None) -> None:
        if chunk is not None:
            whole("chunk", chunk, 1)
        if buffer is not None:
            whole("buffer", buffer, 0)
        self._chunk, self._buffer = chunk, buffer

    @property
    def given(self) -> tuple[int | None, int | None]:
        """Chunk and buffer as given."""
        return self._chunk, self._buffer

    def chunk(self, budget: int | None) -> int:
        """Tokens read at a time; ``budget`` is None for the full cache."""
        if self._chunk is not None:
            return self._chunk
        return LONGEST // 2 if budget is None else default_chunk(budget)

    def buffer(self, budget: int) -> int:
        """B."""
        return default_buffer(budget) if self._buffer is None else self._buffer

    def first_compaction(self, tokens: int, budget: int) -> int | None:
        """After how many of ``tokens`` tokens entries go for the first time; None if they never do."""
        chunk, due = self.chunk(budget), budget + self.buffer(budget)
        seen = min(-(-due // chunk) * chunk, tokens)
        return seen if seen >= due else None

    def touched(self, sample: Sample, budget: int) -> bool:
        """Whether anything that is scored in a sample comes after an eviction."""
        chunk, due, seen = self.chunk(budget), budget + self.buffer(budget), 0
        for turn in sample.turns:
            before, seen = seen, seen + len(turn.ids)
            last = before + (len(turn.ids) - 1) // chunk * chunk
            if (turn.scored and last >= due) or (turn.questions and seen >= due):
                return True
        return False
