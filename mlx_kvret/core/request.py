"""What a user asks of a wing, checked and put into the policy's terms; the same for every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import ConfigError
from .budget import CacheShape, parse_budget, tokens_within
from .config import DEFAULT_BUDGET, EvictionConfig

EVICTION = tuple(field.name for field in dataclasses.fields(EvictionConfig))
NO_GATES = (
    "this model has no retention gates; load it with gates, or choose a policy that needs none "
    "(recent, knorm, keydiff, random, full)"
)


class Finished(Protocol):
    """The figures of a response."""

    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    entries: int
    seen: int
    cache_nbytes: int


def eviction(
    shape: CacheShape, budget: int | str | None = None, buffer: int | None = None, **options: Any
) -> EvictionConfig:
    """The eviction configuration that a user's options mean for a cache of this shape."""
    tokens, size = parse_budget(DEFAULT_BUDGET if budget is None else budget)
    if tokens is None:
        assert size is not None
        tokens = tokens_within(size, shape, buffer)
    return EvictionConfig.create(tokens, buffer, **options)


def split_eviction(options: dict[str, Any], has_cache: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Eviction options and all others.

    Raises:
        ConfigError: eviction options for a cache that has been made.
    """
    evict = {name: value for name, value in options.items() if name in EVICTION}
    if evict and has_cache:
        raise ConfigError(f"{', '.join(evict)} were decided when the cache was made; drop them or drop cache")
    return evict, {name: value for name, value in options.items() if name not in evict}


def prompt_ids(tokenizer: Any, prompt: str | Sequence[int], first: bool) -> list[int]:
    """Token ids of a prompt; a begin token is added to text only at the very start of a cache.

    Raises:
        ConfigError: an empty prompt, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError(
                "the model has no tokenizer, so the prompt must be a list of token ids, not text"
            )
        bos = tokenizer.bos_token
        special = first and (bos is None or not prompt.startswith(bos))
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    if len(prompt) == 0:
        raise ConfigError("the prompt is empty; give at least one token")
    return [int(token) for token in prompt]


def check_max_tokens(max_tokens: int) -> None:
    """Refuse what is no number of tokens; -1 means no limit."""
    if max_tokens == 0 or max_tokens < -1:
        raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1, or -1 for no limit")


def figures(last: Finished) -> str:
    """One line on a finished generation."""
    return (
        f"prompt {last.prompt_tokens} tokens at {last.prompt_tps:.1f}/s, "
        f"{last.generation_tokens} generated at {last.generation_tps:.1f}/s, "
        f"{last.entries:,} entries of {last.seen:,} tokens seen in {last.cache_nbytes / 1e6:.2f} MB"
    )
