"""Text within a budget: one sequence, token by token, on a bounded cache."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.detokenizer import Detokenizer
from mlx_kvret.core.picture_prompts import has_pictures, spoken_by
from mlx_kvret.core.prompts import check_ids, prompt_ids
from mlx_kvret.core.request import check_generation, check_max_tokens, figures, split_eviction
from mlx_kvret.core.sampling import SAMPLING, drawing, split_sampling
from mlx_kvret.errors import UnsupportedFeatureError

from . import hooks
from .attaching import make_cache
from .cache import BoundedCache, cache_argument
from .loops import end_text
from .memory import explained
from .ranks import together
from .sampling import Processor, Sampler, alike, of_first, processors_of, sampler_of
from .seeing import Prepared, Seen, prepared
from .step import decoder_step
from .tokens import Told


@dataclass
class Response:
    """One token and the text it completes, in mlx-lm's fields, and the cache after it.

    ``seen`` tokens were read or written, ``entries`` (one token in one KV head of one layer) are held in
    ``cache_nbytes`` bytes.
    """

    text: str
    token: int
    logprobs: torch.Tensor
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None = None
    seen: int = 0
    entries: int = 0
    cache_nbytes: int = 0

    @property
    def peak_memory(self) -> float:
        """The most memory that torch has taken of the GPU so far, in GB; asked for when it is looked at."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.logprobs.is_cuda else 0.0


class TokenIds:
    """Stands in for a tokenizer where there is none: the text of a token is its number."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


_MLX_ONLY = dict.fromkeys(
    ("num_draft_tokens", "input_embeddings", "kv_group_size", "quantized_kv_start", "max_kv_size",
     "prompt_cache"),
    "it is of mlx-lm",
)  # fmt: skip


def stream_generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Any,
    *,
    images: Any = None,
    max_tokens: int = 256,
    cache: BoundedCache | None = None,
    draft_model: Any = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[Processor] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[Response]:
    """As :func:`mlx_kvret.stream_generate`.

    Args:
        images: pictures beside a text or messages, of a model that sees.
        sampler: log probabilities (1, V) to a token (1,), instead of ``temp`` and the like.
        logits_processors: each takes token ids (1, n) and logits (1, V) and returns logits, as those of
            transformers do.
        prefill_step_size: tokens of the prompt read in one forward pass.
        prompt_progress_callback: called with tokens read and tokens in all.

    Raises:
        ConfigError: a prompt or an option that cannot work, or options that contradict each other.
        CacheError: out of memory; the cache is as it was before the pass.
    """
    evict, rest = split_eviction(options, cache is not None, _OPTIONS, _MLX_ONLY)
    asked, _ = split_sampling(rest)
    if draft_model is not None:
        raise UnsupportedFeatureError(
            "draft_model does not work here; call model.generate(ids, cache=cache, assistant_model=...)"
        )
    check_max_tokens(max_tokens)
    given = {
        "sampler": sampler,
        "logits_processors": logits_processors,
        "prefill_step_size": prefill_step_size,
        "prompt_progress_callback": prompt_progress_callback,
    }
    check_generation(given, asked)
    if cache is None:
        cache = make_cache(model, **evict)
    else:
        hooks.check_cache(model, cache)
    shown = None
    if has_pictures(prompt, images):
        shown = prepared(model, tokenizer, prompt, images, cache.seen == 0)
        check_ids(shown.tokens, vocabulary(model))
        ids = shown.ids
    else:
        listed = prompt_ids(spoken_by(tokenizer), prompt, cache.seen == 0, vocabulary(model))
        ids = torch.tensor([listed], device=model.device)
    reader: Any = TokenIds() if tokenizer is None else spoken_by(tokenizer)
    own: dict[str, Any] = {"sampler": sampler, "logits_processors": logits_processors or ()}
    own |= drawing(alike(model, asked), vocabulary(model), sampler_of, processors_of, logits_processors)
    own["sampler"] = of_first(model, own["sampler"])
    choose = _Choice(**own, ids=ids)
    return _responses(
        model, reader, shown or ids, cache, choose, max_tokens, prefill_step_size, prompt_progress_callback
    )


@torch.no_grad()
def _responses(
    model: PreTrainedModel,
    reader: Any,
    prompt: torch.Tensor | Prepared,
    cache: BoundedCache,
    choose: _Choice,
    max_tokens: int,
    prefill_step_size: int,
    prompt_progress_callback: Callable[[int, int], None] | None,
) -> Iterator[Response]:
    """The loop; what was asked has been checked."""
    stops, text = stop_tokens(model, reader), Detokenizer(reader.decode)
    ids = prompt if isinstance(prompt, torch.Tensor) else prompt.ids
    read, given = cache.seen + ids.shape[1], 0
    try:
        start = time.perf_counter()
        step, told = decoder_step(model, cache), Told(model.device)
        with explained(model, cache, ids, prefill_step_size):
            logits = _read(model, cache, prompt, prefill_step_size, prompt_progress_callback)
        token, logprobs = choose(logits)
        for count in itertools.count(1):
            # the next step is on its way before this token is looked at, and reads the last one too
            turn = told.ask(token)
            following = step(token[:, None], choose if count != max_tokens else _nothing)
            with together(cache.share, "the next token"):
                (value,) = told.get(turn, 1)
            if count == 1:
                prompt_time = time.perf_counter() - start
                start = time.perf_counter()
            reason = "stop" if value in stops else "length" if count == max_tokens else None
            said = "" if reason == "stop" else text.add(value)
            made = Response(
                text=said if reason is None else said + text.end(),
                token=value,
                logprobs=logprobs[0],
                prompt_tokens=ids.shape[1],
                prompt_tps=ids.shape[1] / prompt_time,
                generation_tokens=count,
                generation_tps=count / max(time.perf_counter() - start, 1e-9),
                finish_reason=reason,
                seen=cache.seen,
                entries=cache.entries,
                cache_nbytes=cache.nbytes,
            )
            # nothing comes between this and giving it out
            given = count
            yield made
            if following is None or reason is not None:
                return
            token, logprobs = following
    finally:
        end_text(cache, read + given)


_OPTIONS = (*tuple(inspect.signature(stream_generate).parameters)[3:-1], *SAMPLING)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Any,
    *,
    verbose: bool = False,
    **options: Any,
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


def vocabulary(model: PreTrainedModel) -> int | None:
    """How many token ids a model has vectors for."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Tokens that end a text, of the tokenizer and of the model's generation configuration."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def _read(
    model: PreTrainedModel,
    cache: BoundedCache,
    ids: torch.Tensor | Prepared,
    step: int,
    progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """Read a prompt in chunks and, as mlx-lm does, its last token alone; logits (1, V) after it."""
    if isinstance(ids, Prepared):
        seen = Seen(model, ids)
        seen.read(cache, step, progress)
        after = seen.finish(cache)
        if progress is not None:
            progress(ids.ids.shape[1], ids.ids.shape[1])
        return after
    given, total = cache_argument(model, cache), ids.shape[1]
    for start in range(0, total, step):
        if progress is not None:
            progress(start, total)
        if start < total - 1:
            model(ids[:, start : min(start + step, total - 1)], **given, logits_to_keep=1)
    logits: torch.Tensor = model(ids[:, -1:], **given).logits[:, -1]
    if progress is not None:
        progress(total, total)
    return logits


def _nothing(logits: torch.Tensor) -> None:
    """Nobody asks what comes after the last token."""


class _Choice:
    """From logits (1, V) to the next token (1,) and its log probabilities, without waiting for the device."""

    def __init__(
        self, sampler: Sampler | None, logits_processors: Sequence[Processor], ids: torch.Tensor
    ) -> None:
        self._sampler, self._processors, self._ids = sampler, logits_processors, ids

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._processors:
            # which may keep what they are given
            logits = logits.clone()
        for process in self._processors:
            logits = process(self._ids, logits)
        logprobs = logits.float().log_softmax(-1)
        token = logprobs.argmax(-1) if self._sampler is None else self._sampler(logprobs)
        if self._processors:
            self._ids = torch.cat([self._ids, token[:, None]], 1)
        return token, logprobs
