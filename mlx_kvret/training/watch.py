"""What is to be said while a run can still be stopped: it learns nothing, overshoots, or gets worse."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np

from .config import TrainConfig
from .packing import Batch
from .report import Losses

# steps that one judgement looks back on
SPAN = 10


class Watch:
    """Looks at every step of a run; each warning comes once."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self._kl: list[float] = []
        self._recent: deque[tuple[Losses, float, float]] = deque(maxlen=SPAN)
        self._told: set[str] = set()

    def step(self, losses: Losses, gradient_norm: float, batch: Batch, progress: float) -> Iterator[str]:
        """Warnings that are due after a step; ``progress`` is the share of the run that is done."""
        self._kl.append(losses.kl)
        self._recent.append((losses, gradient_norm, expected_size(batch, self.config.budget)))
        if len(self._recent) < SPAN or progress < self.config.tighten:
            return
        share, norm, size, room = (
            math.fsum(values) / SPAN
            for values in zip(*((x.soft_share, n, x.soft_size, r) for x, n, r in self._recent), strict=True)
        )
        if share > 0.97 and size > 1.2 * room:
            yield from self._tell(
                "nothing",
                f"the gates learn nothing yet: they keep {share:.0%} of the full cache, gradient norm "
                f"{norm:.1e}; lower --bias (it is {self.config.bias:g}) or raise --learning-rate",
            )
        elif size < 0.5 * room:
            yield from self._tell(
                "overshoot",
                f"the gates overshoot: they keep {size:.0f} tokens per head where the budget allows "
                f"{room:.0f}; lower --learning-rate, or raise --tighten towards 1",
            )

    def end(self) -> Iterator[str]:
        """Warnings on the run as a whole."""
        if len(self._kl) < 2 * SPAN:
            return
        losses, _, room = self._recent[-1]
        if "nothing" not in self._told and losses.soft_size > 1.5 * room:
            yield (
                f"the run ended above its budget: {losses.soft_size:.0f} tokens per head where {room:.0f} "
                "are allowed; take more --steps or a higher --learning-rate"
            )
        means = np.convolve(self._kl, np.full(SPAN, 1 / SPAN), "valid")
        # what comes before the budget holds costs less by itself
        settled = means[int(self.config.tighten * len(means)) :]
        if settled[-1] > 1.5 * settled.min() and settled[-1] > 0.02:
            yield (
                f"KL to the full cache rose from {settled.min():.3f} to {settled[-1]:.3f}: later gates are "
                "worse than earlier ones; lower --learning-rate"
            )

    def _tell(self, name: str, text: str) -> Iterator[str]:
        if name not in self._told:
            self._told.add(name)
            yield text


def expected_size(batch: Batch, budget: int) -> float:
    """Tokens per head, averaged over a batch's tokens, of a cache that holds at most ``budget``."""
    position = batch.position[batch.position >= 0]
    return float(np.minimum(position + 1, budget).mean())
