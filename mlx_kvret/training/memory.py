"""Whether a training step fits in memory, and what would."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TrainingError


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs beside the model: a fixed part, and two for every token of a micro-batch.

    ``chunk`` is the most that logits take: they stop growing there.
    """

    fixed: int
    per_token: int
    logits_per_token: int
    chunk: int

    def needed(self, tokens: int) -> int:
        """Bytes for a micro-batch of that many tokens."""
        return self.fixed + tokens * self.per_token + min(tokens * self.logits_per_token, self.chunk)

    def fitting(self, free: int) -> int:
        """The most tokens of a micro-batch that fit into that many bytes."""
        room = free - self.fixed
        # at most one chunk of logits, or less than one
        few = room // (self.per_token + self.logits_per_token)
        return max((room - self.chunk) // self.per_token, min(few, self.chunk // self.logits_per_token), 0)

    def advice(self, free: int) -> str:
        """What would fit into that many bytes, in words."""
        tokens = self.fitting(free)
        if tokens < 64:
            return "not even short sequences would fit; use a smaller model or another device"
        return f"about {tokens:,} tokens fit: lower --length times --micro-batch below that"

    def require(self, tokens: int, free: int | None, device: str) -> None:
        """Refuse a micro-batch of that many tokens if it cannot fit, and say what would.

        Args:
            free: bytes of a device where the model lies already; None where that cannot be told.

        Raises:
            TrainingError: too little is free.
        """
        needed = self.needed(tokens)
        if free is not None and needed > free:
            raise TrainingError(
                f"a step needs about {_gb(needed)} beside the model, and {device} has {_gb(free)} free; "
                f"{self.advice(free)}"
            )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
