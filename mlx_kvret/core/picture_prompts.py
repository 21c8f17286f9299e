"""A prompt with pictures, in any of its forms, as one text with a mark for each picture, and the pictures.

The processors of both libraries take just that. Of the forms: ``images=[...]`` beside a text or beside
messages; messages whose content is a list of parts, ``{"type": "text", "text": ...}`` and ``{"type":
"image"}``, the latter with its picture (``image``, ``path``, ``url``, ``base64``), or to be filled from
``images`` in order; OpenAI's ``{"type": "image_url", "image_url": {"url": "data:..."}}``, and Anthropic's
``{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "..."}}``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .images import Image, open_picture, within
from .options import short
from .prompts import TEXTS

# of LLaVA's records and LLaMA-Factory's, whatever the model's own mark is
COMMON_MARK = "<image>"
_PICTURES = ("image", "image_url", "input_image")
_SOURCES = ("image", "image_url", "path", "url", "base64", "source")
# of what else a part may hold, that changes nothing
_BESIDE = ("type", "detail", "cache_control", "text")
_VIDEOS = ("video", "video_url", "input_video")


@dataclass(frozen=True)
class Asked:
    """A rendered prompt: ``text`` holds as many marks as there are ``pictures``, in their order."""

    text: str
    pictures: list[Image]


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def spoken_by(processor: Any) -> Any:
    """A processor's tokenizer as all that handles text wants it: with the processor's chat template.

    The tokenizer knows its processor from then on (:func:`processor_of`), so that it can be given alone.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer is not processor:
        vars(tokenizer)["_kvret_processor"] = processor
        if not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = getattr(processor, "chat_template", None)
    return tokenizer


def processor_of(tokenizer: Any) -> Any:
    """The processor that a tokenizer belongs to, as far as it is known; else what was given."""
    return getattr(tokenizer, "__dict__", {}).get("_kvret_processor", tokenizer)


def unseeing(tokenizer: Any) -> Any:
    """A tokenizer that knows no processor, which may be more than can be copied."""
    # mlx-vlm hangs its end tokens on a tokenizer, and all it has made of a text with them
    named = ("_kvret_", "stopping_criteria")
    known = [name for name in getattr(tokenizer, "__dict__", {}) if name.startswith(named)]
    if not known:
        return tokenizer
    found = copy.copy(tokenizer)
    for name in known:
        del vars(found)[name]
    return found


def is_processed(prompt: Any) -> bool:
    """Whether a prompt is what a processor made of text and pictures: ids, pixels and what goes with them."""
    return (
        isinstance(prompt, Mapping) and "input_ids" in prompt and any("pixel" in str(name) for name in prompt)
    )


def check_no_video(made: Mapping[str, Any]) -> None:
    """Refuse what a processor made of a video, whose pixels no chunk of a prompt would be given.

    Raises:
        ConfigError: says how a video is given.
    """
    if held := [str(name) for name, value in made.items() if "video" in str(name) and value is not None]:
        raise ConfigError(
            f"the prompt holds a video ({held[0]}); give its frames as images, in their order, beside a text "
            "or messages"
        )


def has_pictures(prompt: Any, images: Any = None) -> bool:
    """Whether a prompt, or what stands beside it, has any picture."""
    if is_processed(prompt):
        return True
    if listed(images):
        return True
    return _is_messages(prompt) and any(
        isinstance(part, Mapping) and _kind(part) in (*_PICTURES, *_VIDEOS)
        for message in prompt
        if isinstance(message, Mapping) and isinstance(message.get("content"), Sequence)
        for part in message["content"]
    )


def asked(
    processor: Any, prompt: Any, images: Any = None, *, first: bool = True, folder: Path | None = None
) -> Asked:
    """A prompt with pictures, rendered.

    A text is taken as it is, as every text prompt is: pictures stand where it has the model's own mark or
    ``<image>``; if it has none they come first. Messages go through the chat template, with the opening of an
    answer; pictures of ``images`` fill their empty image parts, or, if there are none, come first in the last
    message of the user.

    Args:
        images: pictures in any of the forms of :mod:`.images`, or a single one.
        first: the cache is empty; messages begin a conversation.
        folder: what relative paths are relative to.

    Raises:
        ConfigError: no picture, too many or too few, or a prompt that can have none.
    """
    given = _opened(images, folder)
    if isinstance(prompt, str):
        return _of_text(processor, prompt, given)
    if not _is_messages(prompt):
        raise ConfigError(
            f"the prompt is a {type(prompt).__name__} beside pictures; give text or messages, so that the "
            "processor can tell where the pictures stand"
        )
    if not first:
        raise ConfigError(
            "the prompt is messages, which begin a conversation, and the cache has read one already; give "
            "the text of the new turn with images=[...], or a new cache"
        )
    messages, pictures = filled(prompt, given, folder)
    return Asked(_checked(processor, render(processor, messages), len(pictures)), pictures)


def filled(
    messages: Iterable[Any], images: Sequence[Image] = (), folder: Path | None = None
) -> tuple[list[dict[str, Any]], list[Image]]:
    """Messages whose image parts are bare marks, and the pictures in their order.

    Raises:
        ConfigError: ``images`` and empty image parts differ in number, or a part cannot be read.
    """
    rest, pictures, found = list(images), list[Image](), list[dict[str, Any]]()
    plain = [_plain(message, number) for number, message in enumerate(messages)]
    if rest and not any(_is_empty(part) for message in plain for part in _parts(message)):
        _put_first(plain, len(rest))
    empty = sum(_is_empty(part) for message in plain for part in _parts(message))
    if empty != len(rest):
        raise ConfigError(
            f"the messages have {empty} image parts without a picture, and there are {len(rest)} images "
            "beside them; give one for each part"
        )
    for number, message in enumerate(plain):
        if isinstance(message.get("content"), str):
            found.append(message)
            continue
        parts = []
        for part in _parts(message):
            if part["type"] == "image":
                if _is_empty(part):
                    pictures.append(rest.pop(0))
                else:
                    pictures.append(open_picture(part["source"], f"the picture of message {number}", folder))
                part = {"type": "image"}
            parts.append(part)
        found.append(message | {"content": parts})
    return found, pictures


def placed(messages: Iterable[Any], folder: Path | None) -> list[Any]:
    """Messages whose files of pictures are no more relative to ``folder``.

    Raises:
        ConfigError: as of :func:`filled`.
    """
    found = []
    for number, message in enumerate(messages):
        # what is no message is refused by whoever reads it
        if isinstance(message, Mapping) and _parts(message):
            message = _plain(message, number)
            for part in _parts(message):
                if isinstance(part.get("source"), str):
                    part["source"] = within(folder, part["source"])
        found.append(message)
    return found


def render(processor: Any, messages: Sequence[Mapping[str, Any]], answer: bool = True) -> str:
    """Messages by the chat template; ``answer`` adds the opening of one.

    Raises:
        ConfigError: there is no template, or it refuses them.
    """
    owner = processor if getattr(processor, "chat_template", None) else tokenizer_of(processor)
    if not getattr(owner, "chat_template", None):
        raise ConfigError(
            "the prompt is messages, and the model has no chat template; give a text with pictures beside it"
        )
    try:
        return str(
            owner.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=answer, tokenize=False
            )
        )
    except Exception as error:  # a template runs code of its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"the chat template refuses these messages: {reason}; change them") from error


def marks(processor: Any) -> tuple[str, str]:
    """What stands for a picture in a prompt: the mark alone, and with what the chat template puts around it.

    Raises:
        ConfigError: nothing tells.
    """
    named = (getattr(processor, name, None) for name in ("boi_token", "image_token"))
    known = [str(getattr(token, "content", token)) for token in named if token]
    try:
        with_one, without = (
            render(processor, [{"role": "user", "content": [*part, {"type": "text", "text": "·"}]}])
            for part in ([{"type": "image"}], [])
        )
    except ConfigError:
        with_one = without = ""
    around = _inserted(without, with_one)
    alone = next((token for token in known if token in around), known[0] if known else "")
    if alone and alone not in around:
        around = alone
    if not around:
        raise ConfigError(
            "the processor does not tell what stands for a picture in a text; give messages with image parts"
        )
    return alone or around.strip(), around


def _inserted(without: str, having: str) -> str:
    """What one text has more than another, in one place."""
    size = len(having) - len(without)
    for at in range(len(without) + 1) if size > 0 else ():
        if having[:at] + having[at + size :] == without:
            # the place is not unique where its ends repeat; take that which begins with a mark
            piece = having[at : at + size]
            if piece.lstrip()[:1] in ("<", "["):
                return piece
    return ""


def _of_text(processor: Any, text: str, pictures: list[Image]) -> Asked:
    if not text and not pictures:
        raise ConfigError("the prompt is empty; give at least one word")
    alone, around = marks(processor)
    if alone not in text and COMMON_MARK in text:
        text = text.replace(COMMON_MARK, around)
    elif alone not in text:
        text = around * len(pictures) + text
    else:
        text = _with_what_is_around(text, alone, around.strip())
    return Asked(_checked(processor, text, len(pictures)), pictures)


def _with_what_is_around(text: str, alone: str, around: str) -> str:
    """A text whose bare marks have around them what the template puts there: models count positions by it."""
    begin, _, end = around.partition(alone)
    parts = text.split(alone)
    for at, (before, after) in enumerate(itertools.pairwise(parts)):
        if not before.rstrip().endswith(begin.strip()):
            parts[at] += begin
        if not after.lstrip().startswith(end.strip()):
            parts[at + 1] = end + parts[at + 1]
    return alone.join(parts)


def _checked(processor: Any, text: str, pictures: int) -> str:
    alone, _ = marks(processor)
    if (count := text.count(alone)) != pictures:
        raise ConfigError(
            f"the prompt has {count} places for a picture ({alone}), and there are {pictures} pictures; give "
            "one for each place"
        )
    return text


def listed(images: Any) -> list[Any]:
    """What is given as ``images``: a list, or a single picture, or nothing."""
    if images is None:
        return []
    single = isinstance(images, (str, bytes, bytearray, memoryview, Mapping))
    return [images] if single or not isinstance(images, Sequence) else list(images)


def _opened(images: Any, folder: Path | None) -> list[Image]:
    return [open_picture(one, f"images[{n}]", folder) for n, one in enumerate(listed(images))]


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and any(isinstance(item, Mapping) for item in prompt)


def _plain(message: Any, number: int) -> dict[str, Any]:
    """A message with parts of two types: text, and images with their ``source`` (None: not given)."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ConfigError(f"the prompt holds {short(message)} among messages; expected mappings with a role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise ConfigError(
            f"message {number} has the content {short(content)}; expected a text or a list of parts"
        )
    return dict(message) | {"content": [_part(part, number) for part in content]}


def _part(part: Any, number: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = _kind(part) if isinstance(part, Mapping) else None
    if kind in TEXTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _PICTURES:
        source = source_of(part, f"message {number}")
        if source is None and (unknown := [one for one in part if one not in (*_SOURCES, *_BESIDE)]):
            raise ConfigError(
                f"message {number} holds an image with {str(unknown[0])!r}; give the picture as image, path, "
                "url or base64, or as images beside the messages"
            )
        return {"type": "image", "source": source}
    if kind in _VIDEOS:
        raise ConfigError(f"message {number} holds a video; give its frames as image parts, in their order")
    raise ConfigError(f"message {number} holds the part {short(part)}; expected parts of type text or image")


def _kind(part: Mapping[str, Any]) -> Any:
    """A part's type; by what it holds, as templates of many models tell it, where it does not say."""
    if "type" in part:
        return part["type"]
    return next((name for name in ("image", "image_url", "video", "text") if name in part), None)


def source_of(part: Mapping[str, Any], owner: str) -> Any:
    """A part's picture, as :func:`..images.open_picture` takes one; None for one that is to be filled.

    Raises:
        ConfigError: it is told in no known way.
    """
    name = next((name for name in _SOURCES if part.get(name) is not None), None)
    if name is None:
        return None
    source = part[name]
    if isinstance(source, Mapping):
        if isinstance(data := source.get("data"), str):
            return f"data:{source.get('media_type', 'image/png')};base64,{data}"
        # data sets hold pictures as their bytes, or as a path
        found = next((source[one] for one in ("url", "bytes", "path") if source.get(one) is not None), None)
        if found is None:
            raise ConfigError(f"{owner} holds an image whose {name} is {short(source)}; give a url")
        return found
    return f"data:image/png;base64,{source}" if name == "base64" and isinstance(source, str) else source


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_empty(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image" and part["source"] is None


def _put_first(messages: list[dict[str, Any]], count: int) -> None:
    """Empty image parts at the beginning of the last message of the user."""
    for message in reversed(messages):
        if message["role"] == "user":
            content = message.get("content") or ""
            texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            message["content"] = [{"type": "image", "source": None} for _ in range(count)] + texts
            return
    raise ConfigError("there are images beside the messages, none of which is the user's; add one")
