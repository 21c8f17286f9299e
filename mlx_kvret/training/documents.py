"""Records as tokens, and which of the tokens are learnt from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.loading import reading_tokenizer
from ..core.pictures import runs
from ..core.types import Ints, Mask
from ..errors import ConfigError, DataError
from .config import Loss
from .pictures import Sees, opened, spread
from .records import Record


@dataclass(frozen=True)
class Document:
    """``ids`` (n,) int32; ``learn`` (n,) whether a token is to be predicted; ``where`` it comes from.

    ``spans`` are the pictures among its tokens, and ``pixels`` what the model's tower is given for them.
    """

    ids: Ints
    learn: Mask
    where: str
    spans: tuple[tuple[int, int], ...] = ()
    pixels: Mapping[str, Any] = field(default_factory=dict)


def document(record: Record, tokenizer: Any, loss: Loss, sees: Sees | None = None) -> Document:
    """The tokens of a record, by a tokenizer of transformers, and ``sees`` for its pictures.

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
    elif record.images:
        return _with_pictures(record, tokenizer, loss, sees)
    else:
        ids, learn = _chat(record, tokenizer, loss)
    if len(ids) < 2 or not learn[1:].any():
        raise DataError(f"{record.where} has {len(ids)} tokens and none to learn from; remove the record")
    return Document(np.asarray(ids, np.int32), learn, record.where)


def _with_pictures(record: Record, tokenizer: Any, loss: Loss, sees: Sees | None) -> Document:
    """No token of a picture is to be predicted."""
    if sees is None:
        raise DataError(
            f"{record.where} has images, and the model reads text only; remove them, or train a "
            "vision-language model"
        )
    before, learn = _chat(record, tokenizer, loss)
    text = _rendered(record, tokenizer, record.messages or [])
    try:
        made = sees(text, opened(record.images, record.folder, record.where))
    except ConfigError as error:
        raise DataError(f"{record.where}: {error}") from error
    ids = np.asarray(made["input_ids"]).reshape(-1).astype(np.int32)
    marked = ~np.isin(ids, sorted(sees.tokens))
    if loss == "assistant":
        marked &= spread(learn, before, ids.tolist(), sees.tokens, record.where)
    if not marked[1:].any():
        raise DataError(f"{record.where} has {len(ids)} tokens and none to learn from; remove the record")
    pixels = {name: value for name, value in made.items() if name != "input_ids"}
    return Document(ids, marked, record.where, tuple(runs(ids.tolist(), sees.tokens)), pixels)


# fields of a message that a template may leave out without a word
_SHOWN = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def _chat(record: Record, tokenizer: Any, loss: Loss) -> tuple[list[int], Mask]:
    messages = record.messages or []
    if not tokenizer.chat_template:
        raise DataError(f"{record.where} has messages, but the model has no chat template; give text instead")
    tagged = re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template))
    marked = loss == "assistant" and tagged and not record.images
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
    for name in _SHOWN:
        if not any(message.get(name) for message in messages):
            continue
        without = [{key: value for key, value in m.items() if key != name} for m in messages]
        try:
            shown = text != _rendered(record, tokenizer, without)
        except Exception:  # it needs the field, so it shows it
            continue
        if not shown:
            raise DataError(
                f"{record.where} has {name}, and the model's chat template does not show it; remove the field"
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
