"""What is known of a prompt and its answer while they stand in a batch, and what a batch tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .cache import BoundedCache
from .generation import Processor
from .sampling import Sampler


@dataclass
class PromptResponse:
    """How far a prompt is read: ``progress`` tokens of how many."""

    uid: int
    progress: tuple[int, int]
    end_of_segment: bool
    end_of_prompt: bool


@dataclass
class Response:
    """A row's next token, which its cache holds already, and its log probabilities (V,).

    With the last one come a ``finish_reason``, "stop" or "length", the row's own ``prompt_cache`` and all the
    tokens that it holds.
    """

    uid: int
    token: int
    logprobs: torch.Tensor
    finish_reason: str | None = None
    prompt_cache: BoundedCache | None = None
    all_tokens: list[int] | None = None


@dataclass
class Prompt:
    """One prompt and its answer so far; ``tokens`` are those that its cache holds."""

    uid: int
    prompt: list[int]
    total: int
    tokens: list[int]
    most: int
    sampler: Sampler | None
    processors: Sequence[Processor]
    stops: tuple[tuple[int, ...], ...]
    cache: BoundedCache | None
    count: int = 0

    def reason(self) -> str | None:
        """Why it ends with the last token, if it does."""
        ends = (stop for stop in self.stops if len(stop) <= self.count)
        if any(tuple(self.tokens[-len(stop) :]) == stop for stop in ends):
            return "stop"
        return "length" if self.count >= self.most else None


@dataclass
class Group:
    """Sequences, and the cache whose rows they are."""

    cache: BoundedCache
    sequences: list[Prompt] = field(default_factory=list)

    def split(self, which: Sequence[int]) -> Group:
        """These leave, in this order."""
        left = Group(self.cache.split(which), [self.sequences[at] for at in which])
        self.sequences = [one for at, one in enumerate(self.sequences) if at not in set(which)]
        return left

    def extend(self, other: Group) -> None:
        self.cache.extend(other.cache)
        self.sequences += other.sequences
