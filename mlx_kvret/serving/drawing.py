"""How a request's next token is drawn: by the backend, or on the host where logits are changed first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..core.options import MAX_SEED
from ..core.sampling import Sampling
from ..core.types import Array

# below it the likeliest token is drawn anyway
LEAST_TEMP = 1e-6


@dataclass(frozen=True)
class Drawing:
    """What a client asked for.

    Args:
        temp: temperature; 0 takes the likeliest token, whatever ``top_p`` and ``seed`` are.
        top_p: draw from the likeliest tokens that have this much probability together.
        seed: makes the draws repeatable, whoever else is served meanwhile.
        bias: what is added to the logits of some token ids.
        presence, frequency: taken off the logits of tokens of the answer, once and as often as they stand
            there.
    """

    temp: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether the model's logits are taken as they are."""
        return not self.bias and not self.presence and not self.frequency

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as the model has it."""
        return self.temp == 0 and self.plain

    @property
    def sampling(self) -> Sampling:
        """For the backend's own way to draw, where the temperature is not 0."""
        seed = None if self.seed is None else self.seed % (MAX_SEED + 1)
        return Sampling(max(self.temp, LEAST_TEMP), self.top_p, seed)


class Drawer:
    """Draws the tokens of one answer, in their order, on the host: the same on every backend."""

    def __init__(self, asked: Drawing) -> None:
        self._asked, self._said = asked, Counter[int]()
        self._random = np.random.default_rng(None if asked.seed is None else asked.seed % 2**64)

    def __call__(self, logprobs: Array) -> int:
        """A token from log probabilities (V,)."""
        asked, logits = self._asked, logprobs.astype(np.float64)
        for token, added in asked.bias.items():
            logits[token] += added
        for token, count in self._said.items():
            logits[token] -= asked.presence + asked.frequency * count
        token = int(logits.argmax()) if asked.temp == 0 else self._drawn(logits / max(asked.temp, LEAST_TEMP))
        self._said[token] += 1
        return token

    def _drawn(self, logits: Array) -> int:
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        if self._asked.top_p >= 1:
            return int(self._random.choice(len(shares), p=shares))
        order = np.argsort(-shares, kind="stable")
        # the token with which the sum reaches top_p is the last one in
        kept = order[: int(np.searchsorted(np.cumsum(shares[order]), self._asked.top_p)) + 1]
        return int(self._random.choice(kept, p=shares[kept] / shares[kept].sum()))
