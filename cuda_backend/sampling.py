"""How the next token is drawn on torch; the MLX backend's twin is ``mlx_kvret/mlx_backend/sampling.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from mlx_kvret.core.request import Sampling

Sampler = Callable[[torch.Tensor], torch.Tensor]


def sampler_of(asked: Sampling) -> Sampler | None:
    """Log probabilities (1, V) to a token (1,); None for the likeliest. A seed is set at once."""
    if asked.temp == 0:
        return None
    if asked.seed is not None:
        torch.manual_seed(asked.seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(asked.temp))])
    if asked.top_p < 1:
        warpers.append(TopPLogitsWarper(asked.top_p))
    # neither warper looks at the tokens before
    nothing: Any = torch.zeros(1, 0, dtype=torch.long)

    def draw(logprobs: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(warpers(nothing, logprobs).softmax(-1), 1)[:, 0]

    return draw
