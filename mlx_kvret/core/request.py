"""What a user asks of a backend, checked and put into the policy's terms; the same for every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from ..errors import ConfigError
from .advice import advised
from .bits import packings, parse_bits
from .budget import CacheShape, parse_budget, tokens_within
from .config import DEFAULT_BUDGET, MOST_TOKENS, EvictionConfig, GateConfig
from .options import all_callable, check_known, short, whole
from .sampling import Sampling

EVICTION = tuple(field.name for field in dataclasses.fields(EvictionConfig))
NO_GATES = (
    "this model has no retention gates; load it with gates (`mlx-kvret info MODEL` names those that are "
    "known for it, `mlx-kvret train` makes some), or choose a policy that needs none (recent, "
    "knorm, keydiff, random, full), for the model's own caches too: attach(model, policy='recent')"
)
# what others call pictures, or give instead
ELSEWHERE = {
    "image": "pictures are given as images",
    **dict.fromkeys(("video", "videos"), "a video is given as its frames, as images in their order"),
    **dict.fromkeys(("audio", "audios"), "sound is not read"),
}


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
    shape: CacheShape,
    budget: int | str | None = None,
    buffer: int | None = None,
    *,
    gates: GateConfig | None = None,
    **options: Any,
) -> EvictionConfig:
    """The eviction configuration that a user's options mean for a cache of this shape.

    The defaults of the ``gates`` in use (:func:`.advice.advised`) hold where nothing was said.

    Raises:
        ConfigError: options that cannot work.
        UnsupportedFeatureError: bits that the heads of this shape cannot have.
    """
    check_known(options, EVICTION, "a cache")
    bits = parse_bits(options.get("kv_bits"))
    packings(bits, shape.key_dim, shape.value_dim)
    tokens, size = parse_budget(DEFAULT_BUDGET if budget is None else budget)
    if tokens is None:
        assert size is not None
        if buffer is not None:
            whole("buffer", buffer, 0)
        tokens = min(tokens_within(size, shape, buffer, bits), MOST_TOKENS)
    return EvictionConfig.create(tokens, buffer, **advised(options, gates, tokens))


def own_eviction(shape: CacheShape, gates: GateConfig | None, options: dict[str, Any]) -> EvictionConfig:
    """What an attached model's own caches are made with, by the options it was attached with.

    Raises:
        ConfigError: options that cannot work, also for want of gates.
    """
    config = eviction(shape, gates=gates, **options)
    if options and config.policy == "learned" and gates is None:
        raise ConfigError(NO_GATES)
    return config


def check_eviction(options: Mapping[str, Any]) -> None:
    """Refuse eviction options that cannot work, as far as that can be told without a model."""
    check_known(options, EVICTION, "a cache")
    rest = {name: value for name, value in options.items() if name != "budget"}
    tokens, _ = parse_budget(DEFAULT_BUDGET if options.get("budget") is None else options["budget"])
    if tokens is not None:
        EvictionConfig.create(tokens, **rest)


def split_eviction(
    options: dict[str, Any],
    has_cache: bool,
    known: Collection[str] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Eviction options and all others, which must be ``known``; ``elsewhere`` says why some do nothing here.

    Raises:
        ConfigError: an unknown option, or eviction options for a cache that has been made.
    """
    check_known(options, (*EVICTION, *known), "generate", ELSEWHERE | dict(elsewhere or {}))
    evict = {name: value for name, value in options.items() if name in EVICTION}
    if evict and has_cache:
        raise ConfigError(f"{', '.join(evict)} were decided when the cache was made; drop them or drop cache")
    return evict, {name: value for name, value in options.items() if name not in evict}


def check_max_tokens(max_tokens: int) -> None:
    """Refuse what is no number of tokens; -1 means no limit."""
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens == 0 or max_tokens < -1:
        raise ConfigError(
            f"max_tokens is {short(max_tokens)}; expected a whole number of at least 1, or -1 for no limit"
        )


def check_generation(options: Mapping[str, Any], sampling: Sampling) -> None:
    """Refuse values of a generation's other options that cannot work on any backend."""
    if "prefill_step_size" in options:
        whole("prefill_step_size", options["prefill_step_size"], 1)
    if "num_draft_tokens" in options:
        whole("num_draft_tokens", options["num_draft_tokens"], 1)
    for name in ("sampler", "prompt_progress_callback"):
        value = options.get(name)
        if value is not None and not callable(value):
            raise ConfigError(f"{name} is {short(value)}; expected a function")
    all_callable("logits_processors", options.get("logits_processors"))
    if options.get("sampler") is not None and sampling.asked:
        raise ConfigError(
            f"sampler decides alone how tokens are drawn; drop {', '.join(sampling.asked)}, or drop it"
        )


def figures(last: Finished) -> str:
    """One line on a finished generation."""
    return (
        f"prompt {last.prompt_tokens} tokens at {last.prompt_tps:.1f}/s, "
        f"{last.generation_tokens} generated at {last.generation_tps:.1f}/s, "
        f"{last.entries:,} entries of {last.seen:,} tokens seen in {last.cache_nbytes / 1e6:.2f} MB"
    )
