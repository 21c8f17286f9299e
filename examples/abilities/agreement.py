"""Five-turn talks: how far a bounded cache answers as the full cache does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlx_kvret.conversation import Transcript
from mlx_kvret.core.types import Floats
from mlx_kvret.evaluation import Method, Sample, Turn
from mlx_kvret.evaluation.methods import budget_tokens
from mlx_kvret.evaluation.reading import Reading

from .chats import Answer, say
from .talks import TALKS

# the full cache's answer: its nats per token; the share of it before the greedy answer first differs; the
# share of its tokens that are greedy; whether the whole is
NAMES = ("nats", "before the first difference", "greedy tokens", "same answer")


class Greedy(Reading):
    """A reading of one text that notes the likeliest token after every token read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.likeliest: list[int] = []

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        logits = super().forward(*args, **options)
        self.likeliest += logits[0].argmax(-1).tolist()
        return logits

    def room(self) -> int:
        """Tokens until a compaction is due, as while decoding: at least one."""
        assert self.config is not None
        most = (self.config.budget + self.config.buffer) * sum(e.valid.shape[1] for e in self.layers)
        held = sum(int(entries.valid.sum()) for entries in self.layers)
        return max(1, -(-(most - held) // sum(e.valid.shape[1] for e in self.layers)))


def turns_of(
    tokenizer: Any, talk: int, answers: Sequence[Answer]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens read and tokens answered, turn by turn."""
    transcript = Transcript(tokenizer)
    return [say(transcript, text, answer) for text, answer in zip(TALKS[talk], answers, strict=True)]


def agree(engine: Any, turns: Sequence[tuple[Any, Any]], method: Method, budget: str) -> dict[str, float]:
    """The full cache's talk read by another cache, which is asked at every token of an answer for its own.

    Until the first difference that is what it would have answered: answers are read in pieces that end where
    a compaction is due, so that entries go at the same tokens as in decoding.
    """
    sample = Sample(tuple(Turn(read + said, scored=True) for read, said in turns))
    reading = _open(engine, sample, method, budget)
    nats, first, greedy, same = [], [], [], []
    for read, said in turns:
        # as generation does: the last token alone
        for part in filter(None, (read[:-1], read[-1:])):
            reading.read([Turn(part, scored=True)])
        before = len(reading.nats)
        likeliest = reading.likeliest[-1:]
        done = 0
        while done < len(said):
            count = len(said) - done if reading.config is None else min(reading.room(), len(said) - done)
            reading.read([Turn(said[done : done + count], scored=True)])
            likeliest += reading.likeliest[-count:]
            done += count
        right = np.array(likeliest[:-1]) == np.array(said)
        nats.append(_mean(reading.nats[before:]))
        first.append(float(np.append(right, False).argmin() / len(said)))
        greedy.append(float(right.mean()))
        same.append(float(right.all()))
    return dict(zip(NAMES, map(float, map(np.mean, (nats, first, greedy, same))), strict=True))


def _open(engine: Any, sample: Sample, method: Method, budget: str) -> Greedy:
    if method.full:
        return Greedy(engine, [sample], method, None, engine.pace.chunk(None))
    tokens = budget_tokens(budget, sample.tokens)
    config = method.eviction(tokens, engine.pace.buffer(tokens), getattr(engine.gates, "config", None))
    return Greedy(engine, [sample], method, config, engine.pace.chunk(tokens))


def _mean(parts: Sequence[Floats]) -> float:
    return float(np.concatenate(parts, 1).mean())
