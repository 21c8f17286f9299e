"""Records as tokens, and which of the tokens are learnt from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.loading import reading_tokenizer
from ..core.types import Ints, Mask
from ..errors import DataError
from .config import Loss
from .records import Record


@dataclass(frozen=True)
class Document:
    """``ids`` (n,) int32; ``learn`` (n,) whether a token is to be predicted; ``where`` it comes from."""

    ids: Ints
    learn: Mask
    where: str


def document(record: Record, tokenizer: Any, loss: Loss) -> Document:
    """The tokens of a record, by a tokenizer of transformers.

    Raises:
        DataError: the chat template refuses the record, or nothing in it can be learnt from.
    """
    if record.text is not None:
        if loss == "assistant":
            raise DataError(
                f"{record.where} is plain text, and only what an assistant says is to be learnt; "
                "use --loss all, or messages"
            )
        with reading_tokenizer("the model"):
            ids = tokenizer(record.text, verbose=False)["input_ids"]
        learn = np.ones(len(ids), bool)
    else:
        ids, learn = _chat(record, tokenizer, loss)
    if len(ids) < 2 or not learn[1:].any():
        raise DataError(f"{record.where} has {len(ids)} tokens and none to learn from; remove the record")
    return Document(np.asarray(ids, np.int32), learn, record.where)


# fields of a message that a template may leave out without a word
_SHOWN = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def _chat(record: Record, tokenizer: Any, loss: Loss) -> tuple[list[int], Mask]:
    messages = record.messages or []
    if not tokenizer.chat_template:
        raise DataError(f"{record.where} has messages, but the model has no chat template; give text instead")
    marked = loss == "assistant" and re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template))
    try:
        text = _rendered(record, tokenizer, messages)
        _require_shown(record, tokenizer, text)
        if marked:
            out = tokenizer.apply_chat_template(
                messages, tools=record.tools, return_dict=True, return_assistant_tokens_mask=True
            )
            return out["input_ids"], np.asarray(out["assistant_masks"], bool)
        spans = _assistant_spans(record, tokenizer, text) if loss == "assistant" else []
    except DataError:
        raise
    except Exception as error:  # templates are programs of the model's maker
        raise DataError(f"{record.where}: the model's chat template refuses it: {error}") from error
    with reading_tokenizer("the model"):
        out = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=loss == "assistant", verbose=False
        )
    ids: list[int] = out["input_ids"]
    if loss == "all":
        return ids, np.ones(len(ids), bool)
    return ids, _within(ids, out["offset_mapping"], spans, set(tokenizer.all_special_ids))


def _rendered(record: Record, tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tools=record.tools, tokenize=False, **options)
    return text


def _require_shown(record: Record, tokenizer: Any, text: str) -> None:
    """Refuse a record of which the template shows only a part: the rest would be dropped without a word."""
    messages = record.messages or []
    if record.tools and text == tokenizer.apply_chat_template(messages, tokenize=False):
        raise DataError(
            f"{record.where} has tools, and the model's chat template does not show them; remove the field, "
            "or train a model that can call tools"
        )
    for field in _SHOWN:
        if not any(message.get(field) for message in messages):
            continue
        without = [{name: value for name, value in m.items() if name != field} for m in messages]
        try:
            shown = text != _rendered(record, tokenizer, without)
        except Exception:  # it needs the field, so it shows it
            continue
        if not shown:
            raise DataError(
                f"{record.where} has {field}, and the model's chat template does not show it; remove the "
                "field"
            )


def _assistant_spans(record: Record, tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where in the rendered chat the assistant's turns begin and their contents end."""
    messages, spans = record.messages or [], []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{record.where}: message {number} has no text to learn; use --loss all")
        before = _rendered(record, tokenizer, messages[:number], add_generation_prompt=True) if number else ""
        found = text.find(content.strip(), len(before))
        if not text.startswith(before) or found < 0:
            raise DataError(
                f"{record.where}: the chat template rewrites earlier turns, so what the assistant said in "
                f"message {number} cannot be found; use --loss all, or one answer per record"
            )
        spans.append((len(before), found + len(content.strip())))
    return spans


def _within(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], special: set[int]
) -> Mask:
    """Tokens that overlap a span, and the special token behind it: the end of the turn is learnt too."""
    learn = np.zeros(len(ids), bool)
    for begin, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
        learn[inside] = True
        if inside and inside[-1] + 1 < len(ids) and ids[inside[-1] + 1] in special:
            learn[inside[-1] + 1] = True
    return learn
