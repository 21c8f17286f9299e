"""How the next token is drawn on torch; the MLX backend's twin is ``mlx_kvret/mlx_backend/sampling.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mlx_kvret.core.sampling import Sampling

from .attachment import share_of

Sampler = Callable[[torch.Tensor], torch.Tensor]
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def alike(model: PreTrainedModel, asked: Sampling) -> Sampling:
    """How tokens are drawn, on several ranks by a seed of the first one's where none is given."""
    share = share_of(model)
    if share is None or asked.temp == 0 or asked.seed is not None:
        return asked
    seed = torch.randint(2**31 - 1, (1,)).numpy()
    return replace(asked, seed=int(share.ranks.first(seed)[0]))


def of_first(model: PreTrainedModel, draw: Sampler | None) -> Sampler | None:
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
        torch.manual_seed(asked.seed)
    # in the order of transformers' own generate
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(asked.temp))])
    if asked.top_k:
        warpers.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        warpers.append(TopPLogitsWarper(asked.top_p))
    if asked.min_p:
        warpers.append(MinPLogitsWarper(asked.min_p, min_tokens_to_keep=asked.min_tokens_to_keep))
    if asked.xtc_probability:
        warpers.append(ExcludeTop(asked.xtc_probability, asked.xtc_threshold, asked.xtc_special_tokens))
    # no warper looks at the tokens before
    nothing: Any = torch.zeros(1, 0, dtype=torch.long)

    def draw(logprobs: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(warpers(nothing, logprobs).softmax(-1), 1)[:, 0]

    return draw


def alone(asked: Sampling) -> Sampler | None:
    """As :func:`sampler_of`, and with a seed who else draws does not change its tokens."""
    if asked.seed is None:
        return sampler_of(asked)
    before = _state()
    draw, own = sampler_of(asked), _state()
    _set(before)

    def one(logprobs: torch.Tensor) -> torch.Tensor:
        nonlocal own
        assert draw is not None
        before = _state()
        _set(own)
        try:
            return draw(logprobs)
        finally:
            own = _state()
            _set(before)

    return one


def _state() -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the random numbers on the CPU and, where there is one, the GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def processors_of(asked: Sampling) -> list[Processor]:
    """Functions of the tokens (1, n) and the logits (1, V) that return logits: the bias and the penalties."""
    made: list[Processor] = []
    if asked.logit_bias:
        bias: Any = {(token,): float(added) for token, added in asked.logit_bias.items()}
        made.append(SequenceBiasLogitsProcessor(bias))
    for kind, strength, size in asked.penalties():
        penalty: Any = (
            RepetitionPenaltyLogitsProcessor(strength) if kind == "repetition" else Counted(kind, strength)
        )
        made.append(Recent(penalty, size))
    return made


class Recent:
    """A processor that looks back at the last ``size`` tokens only."""

    def __init__(self, process: Processor, size: int) -> None:
        self._process, self._size = process, size

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self._process(ids[:, -self._size :], logits)


class Counted:
    """Takes a penalty off the logits of tokens that were there: once, or as often as they were."""

    def __init__(self, kind: str, strength: float) -> None:
        self._often, self._strength = kind == "frequency", strength

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        count = torch.zeros_like(logits).scatter_add_(1, ids, torch.ones_like(ids, dtype=logits.dtype))
        return logits - self._strength * (count if self._often else count.clamp(max=1))


class ExcludeTop(LogitsProcessor):
    """XTC, which transformers lacks: at times all tokens above a probability but the least likely of them
    are left out, and never the ``special`` ones."""

    def __init__(self, probability: float, threshold: float, special: Any) -> None:
        self._probability, self._threshold, self._special = probability, threshold, list(special or ())
        # made on the device once, which a list of places would wait for at every token
        self._may: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        share = scores.softmax(-1)
        above = share.masked_fill(share <= self._threshold, torch.inf)
        if self._may is None:
            may = torch.ones(scores.shape[-1], dtype=torch.bool)
            may[self._special] = False
            self._may = may.to(scores.device)
        out = (share > above.amin(-1, keepdim=True)) & self._may
        now = torch.rand(len(scores), 1, device=scores.device) < self._probability
        return scores.masked_fill(out & now, -torch.inf)
