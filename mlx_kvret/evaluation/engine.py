"""How samples are run. An engine reads texts into caches of a method and a budget, and asks its questions.

:class:`PublicEngine` does it through the library's public functions, on either backend, one text at a time.
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

from ..core.picture_prompts import tokenizer_of
from ..core.types import Floats
from ..errors import ConfigError
from .chunks import Pace
from .likelihood import on_mlx, on_torch
from .methods import REFERENCES, Method
from .picture_reading import read_on_mlx, read_on_torch
from .samples import Question, Sample, Turn, batches, text_score


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
    ``batch`` texts that are only scored are read side by side on torch; MLX reads one at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        chunk: int | None = None,
        buffer: int | None = None,
        batch: int = 1,
    ) -> None:
        self.model, self.processor, self.pace, self.batch = model, tokenizer, Pace(chunk, buffer), batch
        self.tokenizer = tokenizer_of(tokenizer)
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
        asked = any(turn.questions or not turn.scored for sample in samples for turn in sample.turns)
        outcomes: dict[int, Outcome] = {}
        for places in batches(samples, 1 if self._mlx or asked else self.batch):
            found = self._run([samples[i] for i in places], method, budget)
            outcomes |= zip(places, found, strict=True)
        return [outcomes[i] for i in range(len(samples))]

    def new_cache(self, method: Method, budget: int) -> Any:
        """An empty cache for one text."""
        from ..api import make_cache

        if not self.runs(method):
            raise ConfigError(f"{method.name} looks at attention or answers; run it with backend reference")
        buffer = None if method.full else self.pace.buffer(budget)
        return make_cache(self.model, budget, buffer, policy=method.policy, **method.options_at(budget))

    def _run(self, samples: Sequence[Sample], method: Method, budget: int) -> list[Outcome]:
        """Samples of one shape, several only if nothing is asked."""
        cache, chunk = self.new_cache(method, budget), self.pace.chunk(None if method.full else budget)
        scores, likelihoods, last = list[float](), list[Floats](), None
        for index in range(len(samples[0].turns)):
            turns = [sample.turns[index] for sample in samples]
            if turns[0].scored:
                found, last = self.score([turn.ids for turn in turns], cache, chunk, last)
                likelihoods.append(found)
            else:
                self.take_in(turns[0], cache, chunk)
                last = None
            scores += [self._ask(question, cache) for question in turns[0].questions]
        outcomes = []
        for row in range(len(samples)):
            held = [len(head) for layer in self._kept(cache, row) for head in layer]
            own = [found[row] for found in likelihoods]
            outcomes.append(Outcome(sample_score(scores, own), sum(held) / len(held)))
        return outcomes

    def take_in(self, turn: Turn, cache: Any, chunk: int) -> None:
        """Take in a turn, chunk by chunk; with pictures no chunk cuts one."""
        if turn.pictures:
            take = read_on_mlx if self._mlx else read_on_torch
            take(self.model, self.processor, turn, cache, chunk)
        else:
            self.read(turn.ids, cache, chunk)

    def _kept(self, cache: Any, row: int) -> Any:
        return cache.kept_positions() if self._mlx else cache.kept_positions(row)

    def read(self, ids: Sequence[int], cache: Any, chunk: int) -> None:
        """Take in a text, chunk by chunk."""
        for start in range(0, len(ids), chunk):
            self.forward(ids[start : start + chunk], cache, 0)

    def score(
        self, texts: Sequence[Sequence[int]], cache: Any, chunk: int, last: Any = None
    ) -> tuple[Floats, Any]:
        """Take in texts of one length; log-likelihoods (texts, tokens), and the last logits.

        ``last`` are the logits before the first token, which is left out if there are none. On MLX it is one
        text.
        """
        found = list[Floats]()
        likelihoods = on_mlx if self._mlx else on_torch
        for start in range(0, len(texts[0]), chunk):
            part = [ids[start : start + chunk] for ids in texts]
            logits = self._logits(part, cache)
            found.append(-likelihoods(last, logits, part))
            last = logits[:, -1:]
        return np.concatenate(found, 1), last

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
        logits = self._logits([ids], cache, count)[0]
        if self._mlx:
            import mlx.core as mx

            if count == 0:
                mx.eval([layer.state for layer in cache])
                return np.zeros((0, logits.shape[-1]), np.float32)
            return np.array(logits[-count:].astype(mx.float32))
        return np.asarray(logits[len(logits) - count :].float().cpu().numpy())

    def _logits(self, texts: Sequence[Sequence[int]], cache: Any, count: int | None = None) -> Any:
        """One forward pass: logits (texts, tokens, words) on the device, at least the last ``count`` each."""
        rows = [list(ids) for ids in texts]
        if self._mlx:
            import mlx.core as mx

            from ..mlx_backend.vision import logits_of, speaking

            return logits_of(speaking(self.model)(mx.array(rows), cache=cache))
        import torch

        from mlx_kvret.cuda_backend.cache import cache_argument

        with torch.no_grad():
            tokens = torch.tensor(rows, device=next(self.model.parameters()).device)
            held = cache_argument(self.model, cache)
            keep = 0 if count is None else max(1, count)
            return self.model(tokens, use_cache=True, logits_to_keep=keep, **held).logits


def end_tokens(tokenizer: Any) -> set[int]:
    """Tokens at which a generated answer ends."""
    # mlx-lm's wrapper has a set of them, transformers one or several
    found = getattr(tokenizer, "eos_token_ids", None) or tokenizer.eos_token_id
    return set(found) if isinstance(found, (set, list, tuple)) else {found}


def sample_score(scores: Sequence[float], likelihoods: Sequence[Floats]) -> float:
    """Mean over the questions, or the mean negative log-likelihood of a token."""
    if likelihoods:
        return -float(np.concatenate(likelihoods).mean())
    return sum(scores) / len(scores) if scores else math.nan
