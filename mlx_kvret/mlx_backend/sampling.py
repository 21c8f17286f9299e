"""How the next token is drawn on MLX; the torch backend's twin is ``cuda_backend/sampling.py``."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from ..core.request import Sampling

Sampler = Callable[[mx.array], mx.array]


def sampler_of(asked: Sampling) -> Sampler | None:
    """Log probabilities (1, V) to a token (1,); None for the likeliest. A seed is set at once."""
    if asked.temp == 0:
        return None
    if asked.seed is not None:
        mx.random.seed(asked.seed)
    draw: Sampler = make_sampler(asked.temp, asked.top_p)
    # divided by a low temperature, float16 would overflow
    return lambda logprobs: draw(logprobs.astype(mx.float32))
