"""A model's chat template: messages as text, and that text as token ids.

Pure logic: the only thing it asks for is a tokenizer of transformers, or mlx-lm's wrapper around one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .core.options import short
from .core.plain import plain
from .core.prompts import has_chat_template
from .errors import ConfigError

Message = dict[str, str]
# variables that say what the conversation is
_OURS = {"messages", "add_generation_prompt", "continue_final_message"}


class Template:
    """A tokenizer's chat template, and its tokens.

    Args:
        tokenizer: or a template that has been opened already, with settings of its own.
        settings: values of variables that the template knows, such as ``enable_thinking``.
        answer: what every answer is made to begin with; control tokens in it count.

    Raises:
        ConfigError: the tokenizer has none, or one that knows no such variable.
    """

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any] | None = None, answer: str = "") -> None:
        if isinstance(tokenizer, Template):
            vars(self).update(vars(tokenizer))
            return
        if not has_chat_template(tokenizer):
            raise ConfigError(
                "this model has no chat template; give the text as the model wants it to "
                "`mlx-kvret generate --ignore-chat-template`"
            )
        self._tokenizer, self._settings, self._answer = speaker(tokenizer), dict(settings or {}), answer
        check_text(answer)
        self._check_settings()
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        self._control = tuple(token.content for token in added.values() if token.special)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The whole conversation as text, up to where the next answer goes on.

        Raises:
            ConfigError: the template refuses it, or is broken.
        """
        try:
            return self._rendered(messages)
        except Exception as error:  # a template is a program of its author's
            why = " ".join(plain(f"{type(error).__name__}: {error}", 400).split())
            if messages[0]["role"] == "system" and self._renders(messages[1:]):
                raise ConfigError(
                    f"the model's chat template takes no system message ({why}); leave it out "
                    "(--system-prompt) and put its text in front of the first message"
                ) from error
            raise ConfigError(
                f"the model's chat template cannot render this conversation ({why}); mend the template in "
                "the model's folder, or give the text as the model wants it to `mlx-kvret generate "
                "--ignore-chat-template`"
            ) from error

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        given = [dict(message) for message in messages]
        shown = self._tokenizer.apply_chat_template(
            given, add_generation_prompt=True, tokenize=False, **self._settings
        )
        return f"{shown}{self._answer}"

    def _check_settings(self) -> None:
        """Refuse settings that would have no effect, or are not the user's to make."""
        source = getattr(self._tokenizer, "chat_template", None)
        texts = source.values() if isinstance(source, dict) else [source]
        # a template that is code says itself what it does not take
        if not all(isinstance(text, str) for text in texts):
            return
        known = set[str]().union(*map(_variables, texts)) - _OURS
        for name in self._settings:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise ConfigError(
                    f"the model's chat template has no variable {short(name)} that could be set; "
                    + (f"did you mean {close[0]}?" if close else "leave it out")
                )

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


def _variables(template: str) -> set[str]:
    """Names that a template takes from whoever renders it."""
    import jinja2.meta

    try:
        # with what transformers adds to the language, but for its mark around generated text
        own = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        return jinja2.meta.find_undeclared_variables(own.parse(template))
    except jinja2.TemplateError:
        return set(re.findall(r"[^\W\d]\w*", template))


def speaker(tokenizer: Any) -> Any:
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
