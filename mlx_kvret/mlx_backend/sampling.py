"""How the next token is drawn on MLX; the torch backend's twin is ``cuda_backend/sampling.py``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..core.sampling import Sampling
from .attachment import share_of

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


def alike(model: nn.Module, asked: Sampling) -> Sampling:
    """How tokens are drawn, on several ranks by a seed of the first one's where none is given."""
    share = share_of(model)
    if share is None or asked.temp == 0 or asked.seed is not None:
        return asked
    seed = np.array([mx.random.randint(0, 2**31 - 1).item()])
    return dataclasses.replace(asked, seed=int(share.ranks.first(seed)[0]))


def of_first(model: nn.Module, draw: Sampler | None) -> Sampler | None:
    """The first rank's tokens for all, where several hold a model: others may round to another choice."""
    share = share_of(model)
    if share is None:
        return draw
    ranks = share.ranks
    return ranks.likeliest if draw is None else lambda logprobs: ranks.token(draw(logprobs))


def sampler_of(asked: Sampling) -> Sampler | None:
    """Log probabilities (1, V) to a token (1,); None for the likeliest. A seed is set at once."""
    if asked.temp == 0:
        return None
    if asked.seed is not None:
        mx.random.seed(asked.seed)

    @functools.cache
    def chain(vocabulary: int) -> Sampler:
        made: Sampler = make_sampler(
            asked.temp,
            asked.top_p,
            asked.min_p,
            min(asked.min_tokens_to_keep, vocabulary),
            # mlx-lm refuses to keep all of them
            asked.top_k if asked.top_k < vocabulary else 0,
            asked.xtc_probability,
            asked.xtc_threshold,
            list(asked.xtc_special_tokens or ()),
        )
        return made

    # divided by a low temperature, float16 would overflow
    return lambda logprobs: chain(logprobs.shape[-1])(logprobs.astype(mx.float32))


def alone(asked: Sampling) -> Sampler | None:
    """As :func:`sampler_of`, and with a seed who else draws does not change its tokens."""
    if asked.seed is None:
        return sampler_of(asked)
    before = _state()
    draw, own = sampler_of(asked), _state()
    mx.random.seed(before)

    def one(logprobs: mx.array) -> mx.array:
        nonlocal own
        assert draw is not None
        before = _state()
        mx.random.seed(own)
        try:
            return draw(logprobs)
        finally:
            own = _state()
            mx.random.seed(before)

    return one


def _state() -> int:
    """The seed that gives the random numbers to come; MLX's state cannot be put in place otherwise."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high) << 32 | int(low)


def processors_of(asked: Sampling) -> list[Processor]:
    """Functions of the tokens (n,) and the logits (1, V) that return logits: the bias and the penalties."""
    given: dict[str, Any] = {}
    for kind, strength, size in asked.penalties():
        given |= {f"{kind}_penalty": strength, f"{kind}_context_size": size}
    made: list[Processor] = make_logits_processors(dict(asked.logit_bias or {}), **given)
    return made


def behind(read: list[int], process: Processor) -> Processor:
    """A processor for mlx-lm's loop with a draft model, which does not tell it what was ``read``."""
    before = mx.array(read, mx.uint32)
    return lambda tokens, logits: process(mx.concatenate([before, tokens]), logits)
