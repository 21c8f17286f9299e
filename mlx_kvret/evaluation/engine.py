"""How samples are run. An engine reads texts into caches of a method and a budget, and asks its questions.

:class:`PublicEngine` does it through the library's public functions, on either wing, one text at a time.
:class:`~mlx_kvret.evaluation.reference.ReferenceEngine` is its twin in plain torch, many texts at a time; it
shows attention, so it also runs the policies that look at it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..core.types import Floats
from ..errors import ConfigError
from .chunks import Pace
from .methods import REFERENCES, Method
from .samples import Question, Sample, text_score


@dataclass(frozen=True)
class Outcome:
    """``score`` is the mean over the sample's questions, or the mean negative log-likelihood of a token in
    nats where the text is scored; ``entries`` is what the cache held in the end, per KV head and layer."""

    score: float
    entries: float


class Engine(Protocol):
    """What runs a cell of the grid."""

    name: str
    pace: Pace

    def use_gates(self, gates: Any) -> None:
        """Score with other gates from now on."""

    def runs(self, method: Method) -> bool:
        """Whether the engine can run a method."""

    def run(self, samples: Sequence[Sample], method: Method, budget: int) -> list[Outcome]:
        """Read and ask, in order."""


class PublicEngine:
    """Any loaded model through :func:`mlx_kvret.make_cache` and its own forward pass.

    ``chunk`` tokens are read at a time, half the budget unless given; ``buffer`` is B, M/8 unless given.
    """

    def __init__(
        self, model: Any, tokenizer: Any, chunk: int | None = None, buffer: int | None = None
    ) -> None:
        self.model, self.tokenizer, self.pace = model, tokenizer, Pace(chunk, buffer)
        self._mlx = any(cls.__module__.startswith("mlx.") for cls in type(model).__mro__)
        self.name = "mlx" if self._mlx else "torch"
        self._gates: Any = None

    def use_gates(self, gates: Any) -> None:
        from ..api import attach

        if gates is not self._gates:
            attach(self.model, gates)
            self._gates = gates

    def runs(self, method: Method) -> bool:
        return method.policy not in REFERENCES

    def run(self, samples: Sequence[Sample], method: Method, budget: int) -> list[Outcome]:
        return [self._run_one(sample, method, budget) for sample in samples]

    def new_cache(self, method: Method, budget: int) -> Any:
        """An empty cache for one text."""
        from ..api import make_cache

        if not self.runs(method):
            raise ConfigError(f"{method.name} looks at attention or answers; run it with backend reference")
        buffer = None if method.full else self.pace.buffer(budget)
        return make_cache(self.model, budget, buffer, policy=method.policy, **method.options_at(budget))

    def _run_one(self, sample: Sample, method: Method, budget: int) -> Outcome:
        cache, chunk = self.new_cache(method, budget), self.pace.chunk(None if method.full else budget)
        scores, likelihoods, last = [], list[Floats](), None
        for turn in sample.turns:
            if turn.scored:
                found, last = self.score(turn.ids, cache, chunk, last)
                likelihoods += found
            else:
                self.read(turn.ids, cache, chunk)
            scores += [self._ask(question, cache) for question in turn.questions]
        heads = sum(len(layer) for layer in cache.kept_positions())
        return Outcome(sample_score(scores, likelihoods), cache.entries / heads)

    def read(self, ids: Sequence[int], cache: Any, chunk: int) -> None:
        """Take in a text, chunk by chunk."""
        for start in range(0, len(ids), chunk):
            self.forward(ids[start : start + chunk], cache, 0)

    def score(self, ids: Sequence[int], cache: Any, chunk: int, last: Any = None) -> tuple[list[Floats], Any]:
        """Take in a text; the log-likelihoods of each chunk's tokens, and the last logits.

        ``last`` are the logits before the first token, which is left out if there are none.
        """
        found = []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            logits = self._logits(part, cache)
            likelihoods = _mlx_likelihoods if self._mlx else _torch_likelihoods
            found.append(likelihoods(last, logits, part))
            last = logits[-1:]
        return found, last

    def answer(
        self, ids: Sequence[int], cache: Any, most: int, stops: Callable[[str], bool] | None = None
    ) -> str:
        """Text of up to ``most`` greedy tokens after ``ids``, until an end token or as ``stops`` says."""
        said, text, ends = list[int](), "", end_tokens(self.tokenizer)
        while len(said) < most and not (stops and stops(text)):
            token = int(self.forward(ids, cache, 1)[-1].argmax())
            if token in ends:
                break
            said.append(token)
            text, ids = self.tokenizer.decode(said), (token,)
        return text

    def _ask(self, question: Question, cache: Any) -> float:
        fork = copy.deepcopy(cache)
        if question.metric == "exact":
            said = self.forward(question.ids + question.answer[:-1], fork).argmax(-1)
            return float(said[len(question.ids) - 1 :].tolist() == list(question.answer))
        return text_score(question, self.answer(question.ids, fork, question.max_tokens))

    def forward(self, ids: Sequence[int], cache: Any, wanted: int | None = None) -> Floats:
        """One forward pass into the cache; the last ``wanted`` logits (tokens, words), float32, all for None.

        A chunk of thousands of tokens has gigabytes of logits, so none are made where none are wanted.
        """
        count = len(ids) if wanted is None else wanted
        logits = self._logits(ids, cache, count)
        if self._mlx:
            import mlx.core as mx

            if count == 0:
                mx.eval([layer.state for layer in cache])
                return np.zeros((0, logits.shape[-1]), np.float32)
            return np.array(logits[-count:].astype(mx.float32))
        return np.asarray(logits[len(logits) - count :].float().cpu().numpy())

    def _logits(self, ids: Sequence[int], cache: Any, count: int | None = None) -> Any:
        """One forward pass: the logits (tokens, words) on the device, at least the last ``count`` of them."""
        if self._mlx:
            import mlx.core as mx

            return self.model(mx.array(list(ids))[None], cache=cache)[0]
        import torch

        from cuda_backend.cache import cache_argument

        with torch.no_grad():
            tokens = torch.tensor([list(ids)], device=next(self.model.parameters()).device)
            held = cache_argument(self.model, cache)
            keep = 0 if count is None else max(1, count)
            return self.model(tokens, use_cache=True, logits_to_keep=keep, **held).logits[0]


def end_tokens(tokenizer: Any) -> set[int]:
    """Tokens at which a generated answer ends."""
    # mlx-lm's wrapper has a set of them, transformers one or several
    found = getattr(tokenizer, "eos_token_ids", None) or tokenizer.eos_token_id
    return set(found) if isinstance(found, (set, list, tuple)) else {found}


def log_likelihoods(last: Floats | None, logits: Floats, ids: Sequence[int]) -> Floats:
    """Log-likelihood of each of ``ids`` given what came before.

    ``logits`` (n, words) are those after each of the n ids; ``last`` (1, words) those before the first, None
    at the start of a text, whose first token is then left out.
    """
    before = logits[:-1] if last is None else np.concatenate([last, logits[:-1]])
    wanted = np.asarray(ids[len(ids) - len(before) :])
    top = before.max(-1, keepdims=True)
    norm = top[:, 0] + np.log(np.exp(before - top).sum(-1))
    return np.asarray(before[np.arange(len(before)), wanted] - norm)


def _torch_likelihoods(last: Any, logits: Any, ids: Sequence[int]) -> Floats:
    """:func:`log_likelihoods` where the logits are: they are too many to be moved."""
    import torch
    from torch.nn import functional as F

    wanted = torch.tensor(list(ids), device=logits.device)
    parts = [] if last is None else [F.cross_entropy(last.float(), wanted[:1], reduction="none")]
    parts.append(F.cross_entropy(logits[:-1].float(), wanted[1:], reduction="none"))
    return np.asarray(-torch.cat(parts).cpu().numpy())


def _mlx_likelihoods(last: Any, logits: Any, ids: Sequence[int]) -> Floats:
    """:func:`log_likelihoods` where the logits are: they are too many to be moved."""
    import mlx.core as mx
    import mlx.nn as nn

    wanted = mx.array(list(ids))
    parts = [] if last is None else [nn.losses.cross_entropy(last.astype(mx.float32), wanted[:1])]
    if len(ids) > 1:
        parts.append(nn.losses.cross_entropy(logits[:-1].astype(mx.float32), wanted[1:]))
    return -np.array(mx.concatenate(parts)) if parts else np.zeros(0, np.float32)


def sample_score(scores: Sequence[float], likelihoods: Sequence[Floats]) -> float:
    """Mean over the questions, or the mean negative log-likelihood of a token."""
    if likelihoods:
        return -float(np.concatenate(likelihoods).mean())
    return sum(scores) / len(scores) if scores else math.nan
