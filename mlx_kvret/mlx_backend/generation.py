"""Text within a budget: mlx-lm's own generation loop on a bounded cache."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse, generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..core.config import MOST_TOKENS
from ..core.detokenizer import Detokenizer
from ..core.picture_prompts import has_pictures, spoken_by
from ..core.prompts import check_ids, prompt_ids
from ..core.request import check_generation, check_max_tokens, figures, split_eviction
from ..core.sampling import SAMPLING, drawing, split_sampling
from ..core.watch import watched_steps
from ..errors import ConfigError, UnsupportedFeatureError
from . import hooks
from .attaching import make_cache
from .attachment import share_of
from .cache import BoundedCache
from .loops import Text
from .sampling import alike, behind, of_first, processors_of, sampler_of
from .seeing import Prepared, Seen, Speaker, check_no_pictures, prepared, reader_of
from .vision import is_vision, speaking

CACHE_OPTIONS = ("kv_group_size", "quantized_kv_start", "max_kv_size", "prompt_cache")
# what mlx-lm calls the table that turns token ids into vectors
EMBEDDINGS = {
    "embed_tokens", "wte", "word_embeddings", "embeddings", "tok_embeddings", "embedding", "token_embeddings",
    "embed_in", "embed",
}  # fmt: skip


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
    prompt: Any,
    *,
    max_tokens: int = 256,
    cache: BoundedCache | list[Any] | None = None,
    draft_model: nn.Module | None = None,
    images: Any = None,
    **options: Any,
) -> Iterator[Response]:
    """As :func:`mlx_kvret.stream_generate`; other ``options`` go to ``mlx_lm.stream_generate``.

    Raises:
        ConfigError: a prompt or an option that cannot work, or options that contradict each other.
        ModelMismatchError: ``cache`` is another model's.
        UnsupportedFeatureError: an option of mlx-lm's caches, which would have no effect.
    """
    if useless := [name for name in CACHE_OPTIONS if options.pop(name, None) is not None]:
        raise UnsupportedFeatureError(
            f"{', '.join(useless)} has no effect on a bounded cache; drop it and set budget and kv_bits, or "
            "pass cache"
        )
    known, elsewhere = _loop_options(draft_model is not None)
    eviction, options = split_eviction(options, cache is not None, known, elsewhere)
    asked, options = split_sampling(options)
    check_generation(options, asked)
    check_max_tokens(max_tokens)
    cache = make_cache(model, **eviction) if cache is None else hooks.checked_cache(model, cache)
    if has_pictures(prompt, images):
        picture_prompt = prepared(model, tokenizer, prompt, images, cache.seen == 0)
        if draft_model is not None:
            raise UnsupportedFeatureError(
                "a draft model reads no pictures; drop draft_model, or the pictures"
            )
        ids = picture_prompt.tokens
        check_ids(ids, vocabulary(model))
    else:
        picture_prompt = None
        ids = prompt_ids(spoken_by(tokenizer), prompt, cache.seen == 0, vocabulary(model))
        check_no_pictures(model, ids)
    more = options.get("logits_processors")
    options |= drawing(alike(model, asked), vocabulary(model), sampler_of, processors_of, more)
    if (sampler := of_first(model, options.get("sampler"))) is not None:
        options["sampler"] = sampler
    held: list[Any] = cache
    if draft_model is not None:
        if hooks.attachment(draft_model) is not None:
            raise UnsupportedFeatureError(
                "the draft model is attached: a compaction may come between its drafts, which must be taken "
                "back; detach it"
            )
        check_ids(ids, vocabulary(draft_model), "the draft model")
        options["logits_processors"] = [behind(ids[:-1], p) for p in options.get("logits_processors") or ()]
        held = [*cache, *make_prompt_cache(draft_model)]
        # that loop counts down, and knows no -1
        max_tokens = MOST_TOKENS if max_tokens == -1 else max_tokens
    reader: Any = TokenIds() if tokenizer is None else tokenizer
    rest = {"max_tokens": max_tokens, "draft_model": draft_model, "prompt_cache": held, **options}
    if not is_vision(model):
        return _responses(model, reader, ids, cache, rest)
    reader = reader if tokenizer is None else reader_of(model, tokenizer)
    if picture_prompt is None:
        return _responses(Speaker(speaking(model)), reader, ids, cache, rest)
    return _seeing(model, reader, picture_prompt, cache, rest)


def _seeing(
    model: nn.Module, reader: Any, prompt: Prepared, cache: BoundedCache, options: dict[str, Any]
) -> Iterator[Response]:
    """The prompt is read here, but for its last token; with that mlx-lm's loop begins."""
    step, progress = options.pop("prefill_step_size", 2048), options.pop("prompt_progress_callback", None)
    ids, begun = prompt.tokens, time.perf_counter()
    seen = Seen(model, prompt)
    seen.read(cache, step, progress)
    options["logits_processors"] = [behind(ids[:-1], p) for p in options.get("logits_processors") or ()]
    responses = _responses(Speaker(speaking(model), seen), reader, ids[-1:], cache, options)
    first = next(responses)
    speed = len(ids) / (time.perf_counter() - begun)
    if progress is not None:
        progress(len(ids), len(ids))
    try:
        for response in itertools.chain([first], responses):
            response.prompt_tokens, response.prompt_tps = len(ids), speed
            yield response
    finally:
        responses.close()  # type: ignore[attr-defined]


def _responses(
    model: nn.Module, reader: Any, ids: list[int], cache: BoundedCache, options: dict[str, Any]
) -> Iterator[Response]:
    """mlx-lm's loop; what was asked has been checked."""
    alone = options["draft_model"] is None
    stream: Any = mlx_lm.stream_generate(model, reader, mx.array(ids), **options)
    if share_of(model) is not None:
        stream = watched_steps(stream, "the next token")
    text, given, count = Text(model, cache, len(ids)), list[int](), 0
    # mlx-lm's own drops a space at the beginning
    spoken = Detokenizer(reader.decode)
    try:
        for response in stream:
            given.append(response.token)
            fields = {f.name: getattr(response, f.name) for f in dataclasses.fields(response)}
            fields["text"] = "" if response.finish_reason == "stop" else spoken.add(response.token)
            if response.finish_reason is not None:
                fields["text"] += spoken.end()
                stream.close()
                text.end(given)  # of drafts the last one has not been fed
            if alone or response.finish_reason is not None:
                cache.settle()
            made = Response(
                **fields,
                seen=cache.seen,
                entries=cache.unsettled_entries,
                cache_nbytes=cache.unsettled_nbytes,
            )
            # nothing comes between this and giving it out
            count += 1
            yield made
    finally:
        stream.close()
        text.end(given[:count])


def _loop_options(draft: bool) -> tuple[set[str], dict[str, str]]:
    """Options of mlx-lm's loop with or without a draft model, and why those of the other do nothing."""
    loops = generate_step, speculative_generate_step
    taken, other = (set(inspect.signature(loop).parameters) for loop in (loops[draft], loops[not draft]))
    ours = {"max_tokens", "cache", "draft_model", "images", *SAMPLING}
    known = (taken - {"model", "prompt", "stream", *CACHE_OPTIONS}) | ours
    why = "mlx-lm drops it where there is a draft model" if draft else "it needs a draft_model"
    return known, dict.fromkeys(other - known - {"model", "prompt", "stream"}, why)


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model has vectors for: MLX reads outside of the table without an error."""
    tables = [
        (path.count("."), module.weight.shape[0])
        for path, module in hooks.language_model(model).named_modules()
        if path.rpartition(".")[2] in EMBEDDINGS and getattr(module.get("weight"), "ndim", 0) == 2
    ]
    # the outermost: layers may have tables of their own
    return min(tables)[1] if tables else getattr(getattr(model, "args", None), "vocab_size", None)


def generate(model: nn.Module, tokenizer: Any, prompt: Any, *, verbose: bool = False, **options: Any) -> str:
    """As :func:`mlx_kvret.generate`."""
    text, last = "", None
    for last in stream_generate(model, tokenizer, prompt, **options):
        text += last.text
        if verbose:
            print(last.text, end="", flush=True)
    if verbose and last is not None:
        print(f"\n{figures(last)}")
    return text
