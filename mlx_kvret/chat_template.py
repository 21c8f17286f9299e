"""A model's chat template: messages as text, and that text as token ids.

Pure logic: the only thing it asks for is a tokenizer of transformers, or mlx-lm's wrapper around one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .core.plain import plain
from .core.prompts import has_chat_template
from .errors import ConfigError

Message = dict[str, str]


class Template:
    """A tokenizer's chat template, and its tokens.

    Raises:
        ConfigError: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not has_chat_template(tokenizer):
            raise ConfigError(
                "this model has no chat template; give the text as the model wants it to "
                "`mlx-kvret generate --raw`"
            )
        self._tokenizer = _speaker(tokenizer)
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        self._control = tuple(token.content for token in added.values() if token.special)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The whole conversation as text, up to where the next answer begins.

        Raises:
            ConfigError: the template refuses it, or is broken.
        """
        try:
            return self._rendered(messages)
        except Exception as error:  # a template is a program of its author's
            why = " ".join(plain(f"{type(error).__name__}: {error}", 400).split())
            if messages[0]["role"] == "system" and self._renders(messages[1:]):
                raise ConfigError(
                    f"the model's chat template takes no system message ({why}); leave it out (--system) and "
                    "put its text in front of the first message"
                ) from error
            raise ConfigError(
                f"the model's chat template cannot render this conversation ({why}); mend the template in "
                "the model's folder, or give the text as the model wants it to `mlx-kvret generate --raw`"
            ) from error

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        given = [dict(message) for message in messages]
        return str(self._tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False))

    def _renders(self, messages: Sequence[Mapping[str, str]]) -> bool:
        try:
            return bool(self._rendered(messages))
        except Exception:
            return False

    def encode(self, text: str, plainly: bool = False) -> list[int]:
        """Token ids of rendered text, which has its own begin token; ``plainly``: without control tokens."""
        options = {"split_special_tokens": True} if plainly else {}
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False, **options)]

    def encode_after(self, word: str, text: str) -> list[int]:
        """Token ids of text that stands behind a word, so without the space some tokenizers begin with."""
        if not word:
            return self.encode(text)
        alone, joined = self.encode(word), self.encode(word + text)
        return joined[len(alone) :] if joined[: len(alone)] == alone else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def holds_control(self, text: str) -> bool:
        """Whether the tokenizer would find a control token in this text."""
        return any(token in text for token in self._control)


def _speaker(tokenizer: Any) -> Any:
    """The tokenizer of transformers, whose template has the same defaults on every backend.

    mlx-lm's wrapper would turn ``enable_thinking`` on or off by the vocabulary.
    """
    inner = getattr(tokenizer, "__dict__", {}).get("_tokenizer")
    own_code = getattr(tokenizer, "__dict__", {}).get("_chat_template") is not None
    return inner if hasattr(inner, "apply_chat_template") and not own_code else tokenizer


def check_text(text: str) -> None:
    """Refuse text with bytes that were no UTF-8, which Python carries as lone surrogates.

    Raises:
        ConfigError: names the first place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text has no valid character at place {error.start} ({text[error.start]!r}); give UTF-8"
        ) from error
