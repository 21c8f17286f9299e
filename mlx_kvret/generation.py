"""Text within a budget: mlx-lm's own generation loop on a bounded cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache

from . import hooks
from .cache import BoundedCache
from .core.request import check_max_tokens, figures, prompt_ids, split_eviction
from .errors import ConfigError, UnsupportedFeatureError

CACHE_OPTIONS = ("kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size", "prompt_cache")


@dataclass
class Response(GenerationResponse):
    """mlx-lm's response, and the cache after it.

    ``seen`` tokens were read or written, ``entries`` (one token in one KV head of one layer) are held in
    ``cache_nbytes`` bytes.
    """

    seen: int = 0
    entries: int = 0
    cache_nbytes: int = 0


class TokenIds:
    """Stands in for a tokenizer where there is none: the text of a token is its number."""

    bos_token = eos_token_id = chat_template = None
    clean_up_tokenization_spaces = False

    def encode(self, text: str, **_: Any) -> list[int]:
        return []

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def get_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, messages: Any) -> NoReturn:
        raise ConfigError("the model has no tokenizer, so no chat template; give token ids")


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | list[int] | mx.array,
    *,
    max_tokens: int = 256,
    cache: BoundedCache | list[Any] | None = None,
    draft_model: nn.Module | None = None,
    **options: Any,
) -> Iterator[Response]:
    """As :func:`mlx_kvret.stream_generate`; other ``options`` go to ``mlx_lm.stream_generate``.

    Raises:
        ConfigError: an empty prompt, text without a tokenizer, or options that contradict each other.
        ModelMismatchError: ``cache`` is another model's.
        UnsupportedFeatureError: an option of mlx-lm's caches, which would have no effect.
    """
    eviction, options = split_eviction(options, cache is not None)
    if useless := [name for name in CACHE_OPTIONS if options.get(name) is not None]:
        raise UnsupportedFeatureError(
            f"{', '.join(useless)} has no effect on a bounded cache; drop it and set budget, or pass cache"
        )
    check_max_tokens(max_tokens)
    given: Any = prompt.tolist() if isinstance(prompt, mx.array) else prompt
    if cache is None:
        from .wing import make_cache

        cache = make_cache(model, **eviction)
    else:
        cache = hooks.checked_cache(model, cache)
    ids = prompt_ids(tokenizer, given, cache.seen == 0)
    held: list[Any] = cache
    if draft_model is not None:
        held = [*cache, *make_prompt_cache(draft_model)]
    reader: Any = TokenIds() if tokenizer is None else tokenizer
    stream: Any = mlx_lm.stream_generate(
        model,
        reader,
        mx.array(ids),
        max_tokens=max_tokens,
        draft_model=draft_model,
        prompt_cache=held,
        **options,
    )
    for response in stream:
        fields = {f.name: getattr(response, f.name) for f in dataclasses.fields(response)}
        if response.finish_reason is not None:
            stream.close()  # a draft model's last tokens are taken back
        if draft_model is None or response.finish_reason is not None:
            cache.settle()
        yield Response(
            **fields, seen=cache.seen, entries=cache.unsettled_entries, cache_nbytes=cache.unsettled_nbytes
        )


def generate(
    model: nn.Module, tokenizer: Any, prompt: str | list[int], *, verbose: bool = False, **options: Any
) -> str:
    """As :func:`mlx_kvret.generate`."""
    text, last = "", None
    for last in stream_generate(model, tokenizer, prompt, **options):
        text += last.text
        if verbose:
            print(last.text, end="", flush=True)
    if verbose and last is not None:
        print(f"\n{figures(last)}")
    return text
