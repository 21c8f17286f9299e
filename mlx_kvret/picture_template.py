"""A chat template whose messages may hold pictures, each as its mark in the text of a message.

A picture stands in a conversation as the text that the template writes for one, so that nothing else has to
know of pictures. When such a text is encoded, the model's processor is asked, which puts as many tokens in
the place of a mark as the picture has, and makes the pixels that are read with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .chat_template import Template
from .core.images import Image, open_picture
from .core.picture_prompts import COMMON_MARK, marks, processor_of
from .core.pictures import TOKEN_TYPES
from .errors import ConfigError


class SeeingTemplate(Template):
    """A template, and the pictures of the message that comes.

    Args:
        template: a tokenizer or a template of its own settings.
        backend: the backend's module ``api``, which runs the processor.

    Raises:
        ConfigError: the model takes no pictures, or nothing tells how they stand in a text.
    """

    def __init__(self, template: Any, model: Any, tokenizer: Any, backend: Any) -> None:
        super().__init__(template)
        self._model, self._backend, self._processor = model, backend, processor_of(tokenizer)
        if self._processor is tokenizer:
            raise ConfigError(
                "this model reads text only, or was loaded without its processor; pictures need a "
                "vision-language model"
            )
        self._alone, self._around = marks(self._processor)
        self._pictures: list[Image] = []
        self._made: Any = None

    def show(self, sources: Sequence[Any], text: str) -> str:
        """Have pictures stand in the message that comes; returns its text with their marks.

        They stand where the text says ``<image>``, or first.

        Raises:
            ConfigError: a picture that cannot be read, or not as many as the text has places.
        """
        pictures = [open_picture(source, f"picture {number}") for number, source in enumerate(sources, 1)]
        if self._alone in text and pictures:
            raise ConfigError(
                f"the message spells {self._alone}, which stands for a picture; write {COMMON_MARK} where "
                "one belongs"
            )
        places = text.count(COMMON_MARK) if pictures else 0
        if places and places != len(pictures):
            raise ConfigError(
                f"the message has {places} places for a picture ({COMMON_MARK}), and there are "
                f"{len(pictures)} pictures; give one for each place"
            )
        if self.holds_control(text) and pictures:
            raise ConfigError(
                "the message spells control tokens of this model, which beside a picture cannot be told from "
                "the template's own; leave them out"
            )
        self._pictures, self._made = pictures, None
        if not pictures:
            return text
        return text.replace(COMMON_MARK, self._around) if places else self._around * len(pictures) + text

    def holds_control(self, text: str) -> bool:
        return super().holds_control(text.replace(self._around, "") if self._pictures else text)

    def encode(self, text: str, plainly: bool = False) -> list[int]:
        if plainly or not self._pictures or text.count(self._alone) != len(self._pictures):
            return super().encode(text, plainly)
        self._made = self._backend.processed(self._model, self._processor, text, self._pictures)
        return [int(token) for token in np.asarray(self._made["input_ids"])[0]]

    def encode_after(self, word: str, text: str) -> list[int]:
        found = super().encode_after(word, text)
        if word or not self._pictures:
            return found
        # a conversation begins here: as processors do, with the begin token that some templates leave out
        bare = super().encode("a")
        whole = [int(token) for token in self._tokenizer.encode("a")]
        lead = next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])
        return found if found[: len(lead)] == lead else lead + found

    def prompt(self, ids: list[int]) -> Any:
        """What is read of a planned message: the ids alone, or with the pixels of its pictures."""
        if self._made is None:
            return ids
        prompt = {name: value for name, value in self._made.items() if name != "attention_mask"}
        known = np.asarray(prompt["input_ids"])[0]
        prompt["input_ids"] = np.array([ids], np.int64)
        # they follow the prompt that is read, and not the one that was processed
        for name in TOKEN_TYPES:
            if name in prompt:
                kinds = dict(zip(known.tolist(), np.asarray(prompt[name])[0].tolist(), strict=True))
                prompt[name] = np.array([[kinds.get(token, 0) for token in ids]], np.int64)
        return prompt
