"""A long text read once, and any number of questions about it: :func:`read` and :func:`answer`.

A text is read as the beginning of a message, through the model's chat template where it has one, so that a
question joins it and a saved reading goes on in a chat. Every question is asked of a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import api
from .batching import stream_batch
from .conversation import BETWEEN, Transcript, Turn
from .core.options import of_type, whole
from .core.picture_prompts import listed, spoken_by
from .core.prompts import has_chat_template, prompt_ids
from .core.sampling import SAMPLING
from .errors import CacheError, ConfigError, UnsupportedFeatureError
from .noted import note, notes_of
from .picture_template import SeeingTemplate
from .texts import read_text

# beside the cache of a text that was read as it is
RAW = {"text": "raw"}
Progress = Callable[[int, int], None]
# questions answered at a time: more rows cost little, each has but the memory of what it writes
TOGETHER = 16
# options with which questions are answered side by side; others are of one sequence
_TOGETHER = {"max_tokens", "prefill_step_size", *SAMPLING}


def read(
    model: Any,
    tokenizer: Any,
    text: str | Path | Sequence[str | Path],
    *,
    system: str | None = None,
    raw: bool = False,
    images: Any = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Progress | None = None,
    **options: Any,
) -> Any:
    """Read a text of any length within a budget, and ask about it later; returns the cache that has read it.

    ``save_cache`` keeps it, and ``mlx-kvret chat --cache``, ``generate --cache`` and ``ask --cache`` go on
    with the file.

    Args:
        text: text, or the path of a file in UTF-8; several are read one after another, a blank line between.
        system: system message, where the model's chat template takes one.
        raw: read the text as it is, not as the beginning of a message in the chat template.
        images: pictures of a vision-language model, or one, in any form that :func:`mlx_kvret.generate`
            takes; they stand where the text says ``<image>``, or first.
        prefill_step_size: tokens read in one forward pass.
        prompt_progress_callback: called with tokens read and tokens in all; what it raises ends the reading.
        options: ``budget`` and the others of :func:`mlx_kvret.make_cache`.

    Raises:
        ConfigError: options or files that cannot work, an empty text, or a template that takes no such text.
        OutOfMemoryError, CacheError: as of :func:`mlx_kvret.generate`.
    """
    whole("prefill_step_size", prefill_step_size, 1)
    of_type("text", text, (str, Path, list, tuple), "text, the Path of a file, or a list of these")
    parts = [text] if isinstance(text, (str, Path)) else text
    whole_text = joined([read_text(str(part)) if isinstance(part, Path) else part for part in parts])
    template = None
    if shown := listed(images):
        if raw or not has_chat_template(spoken_by(tokenizer)):
            raise ConfigError(
                "pictures are read through the chat template; leave raw out, or generate with them"
            )
        template = SeeingTemplate(spoken_by(tokenizer), model, spoken_by(tokenizer), api.backend_of(model))
        whole_text = template.show(shown, whole_text)
    cache = api.make_cache(model, **options)
    reading = Reading.begun(model, spoken_by(tokenizer), cache, system, raw, template)
    reading.read(whole_text, prefill_step_size, prompt_progress_callback)
    return reading.cache


def answer(
    model: Any,
    tokenizer: Any,
    cache: Any,
    questions: str | Sequence[str],
    *,
    rows: int = TOGETHER,
    **options: Any,
) -> list[str]:
    """Answers to questions about what a cache has read, each as if it were the only one.

    Args:
        cache: of :func:`read`, or of ``load_cache``; it stays as it is.
        questions: one or several.
        rows: how many are answered side by side (16), as by ``generate_batch``: in 16 bits two tokens that
            are all but equally likely may change places then; 1 asks one after another. So it is where
            ``options`` or the model's layers know no batches.
        options: ``max_tokens``, ``temp`` and the others of :func:`mlx_kvret.generate`.

    Raises:
        ConfigError: an empty question, or a cache of which it is not known what it has read.
        CheckpointError: what was saved beside the cache is no conversation of this model's.
    """
    listed = [questions] if isinstance(questions, str) else list(questions)
    for place, question in enumerate(listed, 1):
        if not isinstance(question, str) or not question.strip():
            raise ConfigError(f"question {place} is {question!r}; give at least one word")
    reading = Reading.of(model, spoken_by(tokenizer), cache, notes_of(cache))
    return [answer.text for answer in reading.answers(listed, rows, **options)]


@dataclass(frozen=True)
class Answer:
    """What was said to a question, and why it ended: "stop" or "length"."""

    text: str
    finish_reason: str


def joined(texts: Sequence[str]) -> str:
    """Several texts as one, a blank line between."""
    for place, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ConfigError(
                f"text {place} is a {type(text).__name__}; expected text, or the Path of a file"
            )
    return BETWEEN.join(texts)


def copied(cache: Any) -> Any:
    """A cache of its own that has read the same."""
    return cache.copy()


class Reading:
    """A cache, and the transcript of what it has read; None where a text was read as it is."""

    def __init__(self, model: Any, tokenizer: Any, cache: Any, transcript: Transcript | None) -> None:
        self.model, self.tokenizer, self.cache, self.transcript = model, tokenizer, cache, transcript

    @classmethod
    def begun(
        cls,
        model: Any,
        tokenizer: Any,
        cache: Any,
        system: str | None = None,
        raw: bool = False,
        template: Any = None,
    ) -> Reading:
        """With an empty cache; ``template`` is the chat template with settings of its own.

        Raises:
            ConfigError: a system message and no chat template, or one that does not take it.
        """
        if not raw and has_chat_template(tokenizer):
            return cls(model, tokenizer, cache, Transcript(template or tokenizer, system))
        if system is not None:
            raise ConfigError("a system message needs a chat template; leave it out, and raw too")
        return cls(model, tokenizer, cache, None)

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, cache: Any, notes: Mapping[str, str], template: Any = None
    ) -> Reading:
        """With a cache that has read something, and what was noted of that.

        Raises:
            ConfigError: nothing was noted.
            CheckpointError: what was noted is damaged, or of another cache.
        """
        if "messages" in notes:
            return cls(model, tokenizer, cache, Transcript.resumed(template or tokenizer, notes, cache.seen))
        if notes == RAW or not has_chat_template(tokenizer):
            return cls(model, tokenizer, cache, None)
        raise ConfigError(
            "it is not known what this cache has read, so no question can join it; give one of "
            "mlx_kvret.read or `mlx-kvret read`, or of a chat that was saved"
        )

    @classmethod
    def opened(cls, model: Any, tokenizer: Any, path: str | Path, template: Any = None) -> Reading:
        """From a file. Raises as :func:`mlx_kvret.load_cache` and :meth:`of`."""
        cache, notes = api.load_cache(model, path)
        return cls.of(model, tokenizer, cache, notes, template)

    def read(self, text: str, step: int, progress: Progress | None = None) -> int:
        """Read a text about which something will be asked; returns the number of its tokens.

        What was read before it was broken off stays read: the same text again goes on there.

        Raises:
            ConfigError: the text is empty, or the template refuses it.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("the text is empty; give at least one word")
        if self.transcript is not None:
            return self.read_turn(self.transcript.plan_text(text), step, progress)
        ids = self._plainly(text)
        self._read(ids, step, progress)
        note(self.cache, self.notes())
        return len(ids)

    def read_turn(self, turn: Turn, step: int, progress: Progress | None = None) -> int:
        """As :meth:`read`, for a text that the transcript has planned."""
        assert self.transcript is not None
        before = self.cache.seen
        try:
            template = self.transcript.template
            new = template.prompt(turn.new) if isinstance(template, SeeingTemplate) else turn.new
            self._read(new, step, progress)
        finally:
            self.transcript.account(turn, self.cache.seen - before, [], "", False)
            note(self.cache, self.notes())
        return len(turn.new)

    def _read(self, ids: Any, step: int, progress: Progress | None) -> None:
        api.backend_of(self.model).read_tokens(self.model, self.cache, ids, step, progress)

    def ask(self, question: str, **options: Any) -> Iterator[Any]:
        """The answer, token by token; the reading stays as it is."""
        ids, twin = self.question_ids(question), copied(self.cache)
        return api.stream_generate(self.model, self.tokenizer, ids, cache=twin, **options)

    def answers(self, questions: Sequence[str], rows: int = TOGETHER, **options: Any) -> Iterator[Answer]:
        """An answer to each question in turn, ``rows`` of them at a time, each of a copy of the cache."""
        whole("rows", rows, 1)
        asked = [self.question_ids(question) for question in questions]
        alone = rows == 1 or len(asked) < 2 or not options.keys() <= _TOGETHER
        done = 0
        if not alone:
            try:
                for answer in self._together(asked, rows, options):
                    done += 1
                    yield answer
            except UnsupportedFeatureError:
                if done:
                    raise
        for question in questions[done:]:
            responses = list(self.ask(question, **options))
            yield Answer("".join(one.text for one in responses), responses[-1].finish_reason)

    def _together(self, asked: list[list[int]], rows: int, options: dict[str, Any]) -> Iterator[Answer]:
        """Each with the random numbers that it would have alone."""
        caches = [self.cache] * len(asked)
        if (seed := options.get("seed")) is not None:
            options = options | {"seed": [seed] * len(asked)}
        texts, reasons = [""] * len(asked), dict[int, str]()
        next_one = 0
        for one in stream_batch(self.model, self.tokenizer, asked, caches=caches, rows=rows, **options):
            texts[one.index] += one.text
            if one.finish_reason is not None:
                reasons[one.index] = one.finish_reason
            while next_one in reasons:
                yield Answer(texts[next_one], reasons[next_one])
                next_one += 1

    def question_ids(self, question: str) -> list[int]:
        """What has to be read so that a question is answered.

        Raises:
            ConfigError: the template refuses it.
            CacheError: the cache has gone on without its transcript.
        """
        self.check()
        return (
            self._plainly(question) if self.transcript is None else self.transcript.copy().plan(question).new
        )

    def check(self) -> None:
        """Refuse a cache that has gone on without its transcript."""
        if self.transcript is not None and self.cache.seen != len(self.transcript):
            raise CacheError(
                f"the cache has read {self.cache.seen} tokens, the conversation has {len(self.transcript)}; "
                "read the text again"
            )

    def notes(self) -> dict[str, str]:
        """What :meth:`of` needs."""
        return dict(RAW) if self.transcript is None else self.transcript.notes()

    def _plainly(self, text: str) -> list[int]:
        first = self.cache.seen == 0
        return prompt_ids(self.tokenizer, text if first else BETWEEN + text, first)
