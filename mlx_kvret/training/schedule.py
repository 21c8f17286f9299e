"""The learning rate over a run."""

from __future__ import annotations

import math


def rate(progress: float, warmup: float, step: int) -> float:
    """Share of the highest learning rate: a linear rise over ``warmup``, then a cosine down to 0.

    ``progress`` is the share of the run that is done, in the middle of the step in question, before which
    ``step`` steps were taken. A ``warmup`` of 1 or more is a number of steps.
    """
    if warmup >= 1:
        return min(1.0, (step + 0.5) / warmup) * rate(progress, 0, step)
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
