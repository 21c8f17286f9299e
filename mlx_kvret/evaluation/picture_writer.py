"""From pictures and text to samples for any processor, through the chat template: models that see are chat
models.

A sample's turn ends where the last picture does; what follows of the prompt is the question's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bitmap import Bitmap
from ..core.loading import reading_tokenizer
from ..core.picture_prompts import marks, render, tokenizer_of
from ..errors import ConfigError
from .samples import Question, Sample, Turn

Part = str | Bitmap
_MARK = "@@{}@@"


class PictureWriter:
    """Encodes with a processor.

    Raises:
        ConfigError: a tokenizer alone, which cannot make tokens of pictures.
    """

    def __init__(self, processor: Any) -> None:
        if not hasattr(processor, "image_processor"):
            raise ConfigError(
                "the task has pictures, and this model was loaded without a processor for them; use a "
                "vision-language model, whose folder has a preprocessor_config.json"
            )
        self._processor = processor
        self._mark, _ = marks(processor)

    def sample(self, pictures: Sequence[Bitmap], asked: str, question: Question) -> Sample:
        """Pictures, then a question after them, whose ids are filled in."""
        (before, after), _ = self._pieces([([*pictures, _MARK.format(0) + asked], "")])
        ids = self._encode(before, pictures)
        filled = dataclasses.replace(question, ids=self._encode(after, ()))
        return Sample((Turn(ids, (filled,), pictures=tuple(pictures)),))

    def dialogue(self, said: Sequence[tuple[Sequence[Part], str]]) -> Sample:
        """Questions with pictures and their answers, in one cache; the answers' tokens are scored."""
        pieces, pictures = self._pieces([(parts, answer) for parts, answer in said])
        turns = []
        for index, piece in enumerate(pieces):
            if not piece:
                continue
            own = () if index % 2 else tuple(pictures[index // 2])
            turns.append(Turn(self._encode(piece, own), scored=bool(index % 2), pictures=own))
        return Sample(tuple(turns))

    def _pieces(self, said: Sequence[tuple[Sequence[Part], str]]) -> tuple[list[str], list[list[Bitmap]]]:
        """The rendered conversation, cut at the marks: prompts and answers in turn; and each prompt's
        pictures."""
        messages, pictures, count = list[dict[str, Any]](), [], 0
        single = not any(answer for _, answer in said)
        for parts, answer in said:
            content = [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts
            ]
            messages.append({"role": "user", "content": content})
            pictures.append([p for p in parts if isinstance(p, Bitmap)])
            if answer:
                marked = _MARK.format(count) + answer + _MARK.format(count + 1)
                messages.append({"role": "assistant", "content": [{"type": "text", "text": marked}]})
                count += 2
        shown, pieces = render(self._processor, messages, answer=single), list[str]()
        for number in range(1 if single else count):
            piece, found, shown = shown.partition(_MARK.format(number))
            if not found:
                raise ConfigError(
                    "the chat template does not show what was said as it was; this task cannot use it"
                )
            pieces.append(piece)
        return [*pieces, shown] if single else pieces, pictures

    def _encode(self, text: str, pictures: Sequence[Bitmap]) -> tuple[int, ...]:
        if text.count(self._mark) != len(pictures):
            raise ConfigError(
                f"a prompt has {text.count(self._mark)} places for a picture ({self._mark}) and "
                f"{len(pictures)} pictures; remove that mark from the record's text"
            )
        with reading_tokenizer("the model"):
            if not pictures:
                return tuple(tokenizer_of(self._processor).encode(text, add_special_tokens=False))
            made = self._processor(
                text=[text],
                images=[p.image for p in pictures],
                add_special_tokens=False,
                return_tensors="np",
            )
        return tuple(np.asarray(made["input_ids"])[0].tolist())
