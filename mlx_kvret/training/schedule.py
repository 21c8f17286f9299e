"""The learning rate over a run."""

from __future__ import annotations

import math


def rate(progress: float, warmup: float) -> float:
    """Share of the highest learning rate: a linear rise over ``warmup``, then a cosine down to 0.

    ``progress`` is the share of the run that is done, in the middle of the step in question.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
