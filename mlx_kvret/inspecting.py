"""What a bounded cache keeps of a text, as a page: :func:`inspect`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from . import api
from .conversation import Transcript
from .core.detokenizer import token_texts
from .core.files import whole_file
from .core.history import History, described
from .core.options import of_type, whole
from .core.picture_prompts import has_pictures, listed, spoken_by
from .core.prompts import has_chat_template, prompt_ids
from .core.request import EVICTION
from .core.sampling import SAMPLING
from .errors import ConfigError
from .page.files import page_of
from .picture_template import SeeingTemplate

BETWEEN = "\n\n"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Inspection:
    """What came of a text.

    ``history`` tells which compaction took which entry; ``data`` is that and all else that the page shows.
    ``answer`` is what the model said to the prompt, if there was one.
    """

    history: History
    data: dict[str, Any]
    answer: str

    def save(self, path: str | PathLike[str]) -> None:
        """Write the page: one file of HTML that needs nothing beside it, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        # it holds the text
        with whole_file(path, private=True) as scratch:
            scratch.write_text(page_of(self.data), encoding="utf-8")


def inspect(
    model: Any,
    tokenizer: Any,
    text: str | None = None,
    *,
    prompt: str | None = None,
    images: Any = None,
    system: str | None = None,
    raw: bool = False,
    title: str = "the model",
    prefill_step_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
    **options: Any,
) -> Inspection:
    """Read a text within a budget, let the model answer a prompt, and tell what was kept of every token.

    >>> mlx_kvret.inspect(model, tokenizer, "a long text", budget=64).save("page.html")

    Args:
        text: what is read first, if anything.
        prompt: what is asked about it; then the answer is part of what is shown.
        images: pictures that the prompt is about, in any of the forms of :func:`mlx_kvret.generate`, of a
            vision-language model with a chat template; they stand where the text says ``<image>``, or first.
        system: system message, where the model's chat template takes one.
        raw: read the text as it is, not as a message in the chat template.
        title: what the page calls the model.
        prefill_step_size: tokens read in one forward pass, after which a compaction may come; half a budget
            unless given.
        prompt_progress_callback: called with tokens read and tokens in all.
        options: ``budget`` and the others of :func:`mlx_kvret.make_cache`; with a ``prompt`` also
            ``max_tokens`` and those of :func:`mlx_kvret.generate`.

    Raises:
        ConfigError: options that cannot work or have no effect, or nothing to read.
        OutOfMemoryError, CacheError: as of :func:`mlx_kvret.generate`.
    """
    if prompt is None and (useless := [name for name in options if name in (*SAMPLING, "max_tokens")]):
        raise ConfigError(f"{', '.join(useless)} has no effect without a prompt; drop it, or give one")
    known = tuple(options) if prompt is None else EVICTION
    eviction = {name: options.pop(name) for name in known if name in options}
    tokenizer = spoken_by(tokenizer)
    ids: Any
    if has_pictures(None, images):
        ids = _shown(model, tokenizer, _joined(text, prompt), prompt is not None, images, system, raw)
    else:
        ids = _ids(tokenizer, text, prompt, system, raw)
    return look(
        model, tokenizer, ids, api.make_cache(model, **eviction), prompt is not None, title,
        prefill_step_size, prompt_progress_callback, **options
    )  # fmt: skip


def look(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int] | Mapping[str, Any],
    cache: Any,
    answers: bool,
    title: str = "the model",
    step: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Inspection:
    """As :func:`inspect`, of token ids and an empty cache; ``answers`` says whether the model goes on.

    With pictures it goes on, and ``ids`` are what a processor made of text and pictures.
    """
    if cache.shared is None:
        raise ConfigError("policy full keeps everything, so there is nothing to see; choose another policy")
    config, backend = cache.shared.config, api.backend_of(model)
    step = max(1, config.budget // 2) if step is None else step
    whole("prefill_step_size", step, 1)
    shape, layers = backend.competing(model)
    history, said = History(shape.layers, shape.kv_heads), list[str]()
    given = list[int]()

    def told() -> Inspection:
        texts, found = token_texts(given, spoken_by(tokenizer).decode), cache.pictures
        # torch has them by row
        pictures = found[0] if isinstance(found, list) else found
        shown = described(history, texts, shape, layers, config, title, pictures)
        return Inspection(history, shown, "".join(said))

    if isinstance(ids, Mapping):
        given += np.asarray(ids["input_ids"]).reshape(-1).tolist()

        def follow(done: int, total: int) -> None:
            history.follow(cache)
            if progress is not None:
                progress(done, total)

        read = {"prefill_step_size": step, "prompt_progress_callback": follow}
        _answer(model, tokenizer, ids, cache, history, given, said, **read, **options)
        return told()
    given += ids
    # the last token is read by whoever answers
    before = len(given) - answers
    for start in range(0, before, step):
        if progress is not None:
            progress(start, before)
        end = min(start + step, before)
        backend.read_tokens(model, cache, given[start:end], end - start)
        history.follow(cache)
    if progress is not None:
        progress(before, before)
    if answers:
        _answer(model, tokenizer, given[before:], cache, history, given, said, **options)
    return told()


def _answer(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    cache: Any,
    history: History,
    given: list[int],
    said: list[str],
    **options: Any,
) -> None:
    """Have the model go on, and take down what it says and what goes meanwhile."""
    for response in api.stream_generate(model, tokenizer, prompt, cache=cache, **options):
        history.follow(cache)
        given.append(int(response.token))
        said.append(response.text)
    history.follow(cache)


def _shown(
    model: Any, tokenizer: Any, text: str, asks: bool, images: Any, system: str | None, raw: bool
) -> Any:
    """What is read of a text with pictures: what the model's processor makes of them."""
    if not asks:
        raise ConfigError("images go with a question about them; give a prompt too")
    if raw or not has_chat_template(tokenizer):
        raise ConfigError("images need the model's chat template; drop raw, or images")
    template = SeeingTemplate(tokenizer, model, tokenizer, api.backend_of(model))
    asked = template.show(listed(images), text)
    return template.prompt(Transcript(template, system).plan(asked).new)


def _joined(text: str | None, prompt: str | None) -> str:
    """The text, and behind it the prompt."""
    for name, part in (("text", text), ("prompt", prompt)):
        if part is not None:
            of_type(name, part, (str,), "text")
    whole_text = BETWEEN.join(part for part in (text, prompt) if part is not None)
    if not whole_text.strip():
        raise ConfigError("there is nothing to read; give a text, a prompt, or both")
    return whole_text


def _ids(tokenizer: Any, text: str | None, prompt: str | None, system: str | None, raw: bool) -> list[int]:
    whole_text = _joined(text, prompt)
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, so that no text can be shown; add one to its folder")
    if not raw and has_chat_template(tokenizer):
        transcript = Transcript(tokenizer, system)
        turn = transcript.plan_text(whole_text) if prompt is None else transcript.plan(whole_text)
        return turn.new
    if system is not None:
        raise ConfigError("a system message needs a chat template; leave it out, and raw too")
    return prompt_ids(tokenizer, whole_text, True)
