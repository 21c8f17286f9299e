"""A prompt in any of the forms people have it in, as a list of token ids; the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from ..errors import ConfigError
from .loading import reading_tokenizer
from .options import short

FORMS = (
    "give text, token ids (a list, or an array of shape (n,) or (1, n)), what apply_chat_template returns, "
    "or messages"
)
# types of a message's parts that are texts
TEXTS = ("text", "input_text", "output_text")
# what a tokenizer's answer may hold beside the ids without changing what they mean
_BESIDE_IDS = ("attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length")


def prompt_ids(tokenizer: Any, prompt: Any, first: bool, vocabulary: int | None = None) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: None where the model has none; then only ids will do.
        prompt: text; token ids as a list, or as an array of numpy, torch or MLX, (n,) or (1, n); what
            ``apply_chat_template`` returns, a mapping with ``input_ids``; or messages, a list of mappings
            with ``role`` and ``content``, read through the chat template with its opening of an answer.
        first: the cache is empty. Then a begin token is added to text that lacks it.
        vocabulary: rows of the model's embedding; ids must be below it.

    Raises:
        ConfigError: anything else, an empty prompt, or an id outside of the vocabulary.
    """
    if isinstance(prompt, str):
        ids = _of_text(tokenizer, prompt, first)
    elif _is_messages(prompt):
        ids = _of_messages(tokenizer, prompt, first)
    else:
        ids = _of_ids(prompt)
    if not ids:
        raise ConfigError("the prompt is empty; give at least one token")
    check_ids(ids, vocabulary)
    return ids


def check_ids(ids: Sequence[int], vocabulary: int | None, owner: str = "the model") -> None:
    """Refuse token ids that a model has no embedding for."""
    for wrong in (min(ids), max(ids)):
        if wrong < 0 or (vocabulary is not None and wrong >= vocabulary):
            known = f"0 to {vocabulary - 1}" if vocabulary else "numbers from 0 up"
            raise ConfigError(
                f"the prompt holds token id {short(wrong)}, {owner}'s are {known}; "
                "make the ids with the tokenizer of this model"
            )


def _of_text(tokenizer: Any, text: str, first: bool) -> list[int]:
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, so the prompt must be a list of token ids, not text")
    if not text:
        raise ConfigError("the prompt is empty; give at least one word, or the begin token's id")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is no valid text: character {error.start} is half of a surrogate pair; "
            "decode the text with the encoding it was written in"
        ) from error
    with reading_tokenizer("this model"):
        bos = tokenizer.bos_token
        special = first and (bos is None or not text.startswith(bos))
        return [int(token) for token in tokenizer.encode(text, add_special_tokens=special)]


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and any(isinstance(item, Mapping) for item in prompt)


def _of_messages(tokenizer: Any, messages: Sequence[Any], first: bool) -> list[int]:
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"the prompt holds {short(message)} among messages; expected mappings with role and content"
            )
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and part.get("type", "text") not in TEXTS:
                raise ConfigError(
                    f"the messages hold a part of type {short(part['type'])}; text and pictures are read: "
                    "give parts of type text or image"
                )
    if not has_chat_template(tokenizer):
        raise ConfigError(
            "the prompt is messages, and the model has no chat template; give text or token ids instead"
        )
    if not first:
        raise ConfigError(
            "the prompt is messages, which begin a conversation, and the cache has read one already; give "
            "the text of the new turn, or a new cache"
        )
    try:
        found = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template runs code of its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"the chat template refuses these messages: {reason}; change them") from error
    return [int(token) for token in found]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether messages can be rendered; mlx-lm's tokenizers may have a template that is code."""
    known = getattr(tokenizer, "has_chat_template", None)
    return bool(getattr(tokenizer, "chat_template", None) if known is None else known)


def _of_ids(prompt: Any) -> list[int]:
    """Ids from one row of whole numbers in any container."""
    ids = []
    for item in _row(_ids_beside(prompt) if isinstance(prompt, Mapping) else prompt):
        value = item.tolist() if hasattr(item, "tolist") else item
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ConfigError(f"the prompt holds {short(value)} where a token id should be; {FORMS}")
        ids.append(int(value))
    return ids


def _ids_beside(prompt: Mapping[str, Any]) -> Any:
    if "input_ids" not in prompt:
        hint = "; messages are a list: put it in brackets" if "role" in prompt else f"; {FORMS}"
        raise ConfigError(f"the prompt is a mapping without input_ids{hint}")
    if unused := [str(name) for name in prompt if name not in ("input_ids", *_BESIDE_IDS)]:
        raise ConfigError(f"the prompt holds {', '.join(unused)}, which no text needs; give input_ids alone")
    if "attention_mask" in prompt and not all(_row(prompt["attention_mask"])):
        raise ConfigError("the prompt's attention_mask hides some of its tokens; give the tokens that count")
    return prompt["input_ids"]


def _row(prompt: Any) -> Sequence[Any]:
    """The elements of a row: of shape (n,), or (1, n)."""
    row = _plain(prompt)
    if len(row) == 1 and _is_row(row[0]):
        return _plain(row[0])
    if len(row) > 1 and all(map(_is_row, row)):
        raise ConfigError(
            f"the prompt has {len(row)} rows of token ids; one text is generated at a time, give one row"
        )
    return row


def _plain(found: Any) -> Sequence[Any]:
    """An array or a sequence as one that can be walked."""
    try:
        values = found.tolist() if hasattr(found, "tolist") else found
    except Exception as error:  # a tensor without content, say
        raise ConfigError(f"the prompt's token ids cannot be read ({error}); {FORMS}") from error
    if not _is_row(values):
        raise ConfigError(f"the prompt is {_named(found)}; {FORMS}")
    return values


def _is_row(item: Any) -> bool:
    if hasattr(item, "tolist"):
        return len(getattr(item, "shape", ())) > 0
    return isinstance(item, Sequence) and not isinstance(item, (str, bytes, bytearray))


def _named(prompt: Any) -> str:
    if prompt is None:
        return "None"
    kind = type(prompt).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
