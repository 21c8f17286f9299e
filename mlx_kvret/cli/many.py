"""Many prompts from a file of JSON lines, answered side by side: what ``generate --prompts`` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.images import within
from ..core.options import short
from ..core.picture_prompts import placed
from ..core.request import check_max_tokens
from ..errors import ConfigError
from ..texts import read_picture, read_text
from .pictures import Pictures
from .session import chosen_template, drawn, load, required, say

KNOWN = ("prompt", "messages", "images", "budget", "max_tokens", "id")


@dataclass(frozen=True)
class Asked:
    """A line of the file: a prompt, and what it wants other than the rest."""

    where: str
    prompt: str | list[Any]
    images: list[str]
    budget: Any
    max_tokens: Any
    name: Any

    @classmethod
    def of(cls, line: str, where: str, budget: Any, max_tokens: int) -> Asked:
        """Raises ConfigError that names the line."""
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is no JSON ({error}); expected one object a line") from error
        if not isinstance(found, Mapping) or ("prompt" in found) == ("messages" in found):
            raise ConfigError(f"{where} is {short(found)}; expected an object with a prompt, or messages")
        if unknown := [name for name in found if name not in KNOWN]:
            raise ConfigError(f"{where} has {unknown[0]!r}; expected {', '.join(KNOWN)}")
        prompt, kind = (found["prompt"], str) if "prompt" in found else (found["messages"], list)
        if not isinstance(prompt, kind) or not prompt:
            raise ConfigError(f"{where} has {short(prompt)} as prompt; expected text, or a list of messages")
        images = found.get("images", [])
        if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
            raise ConfigError(f"{where} has {short(images)} as images; expected a list of files")
        most = found.get("max_tokens", max_tokens)
        check_max_tokens(most)
        return cls(where, prompt, images, found.get("budget", budget), most, found.get("id"))


def answer_many(file: str, rows: int, options: dict[str, Any], eviction: dict[str, Any]) -> None:
    """Answer every line of ``file`` and print one object a line, as answers are complete.

    ``index`` is the line's place from 0, ``id`` its own, if it has one.

    Raises:
        ConfigError: a line that cannot work, before anything is answered.
    """
    from ..batching import stream_batch

    budget = eviction.pop("budget")
    lines = [line for line in enumerate(read_text(file).splitlines(), 1) if line[1].strip()]
    if not lines:
        raise ConfigError(f"{file} holds no prompt; expected one JSON object a line")
    asked = [Asked.of(line, f"line {at} of {file}", budget, options["max_tokens"]) for at, line in lines]
    model, tokenizer = load(options)
    folder = None if file == "-" else Path(file).expanduser().parent
    prompts, images = _prompts(model, asked, required(tokenizer), folder, options)
    draw = drawn(model, tokenizer, options)
    texts = [""] * len(asked)
    for one in stream_batch(
        model,
        tokenizer,
        prompts,
        images=images,
        budget=[line.budget for line in asked],
        max_tokens=[line.max_tokens for line in asked],
        rows=rows,
        prefill_step_size=options["prefill_step_size"],
        **draw,
        **eviction,
    ):
        texts[one.index] += one.text
        if one.finish_reason is not None:
            made = {"index": one.index, "text": texts[one.index], "finish_reason": one.finish_reason}
            made |= {"prompt_tokens": one.prompt_tokens, "generation_tokens": one.count}
            made |= {"kv_entries": one.cache.entries}
            name = asked[one.index].name
            say(json.dumps(made | ({} if name is None else {"id": name}), ensure_ascii=False) + "\n")


class _Shown(Mapping[str, Any]):
    """What the processor makes of a text and its pictures: large, made whenever its items are asked for."""

    # it is known by them before it is made
    _NAMES = ("input_ids", "pixel_values")

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Any:
        return self._make()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._NAMES)

    def __len__(self) -> int:
        return len(self._NAMES)

    def __contains__(self, name: object) -> bool:
        return name in self._NAMES

    def items(self) -> Any:
        return self._make().items()


def _prompts(
    model: Any, asked: list[Asked], tokenizer: Any, folder: Path | None, options: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """What the model reads for each line, as ``generate`` reads a prompt, and the pictures beside it."""
    from ..conversation import Transcript

    template, system = chosen_template(tokenizer, options), options.pop("system_prompt")
    prompts, images = list[Any](), list[Any]()
    for line in asked:
        beside = [within(folder, one) for one in line.images]
        if template is None or not isinstance(line.prompt, str):
            if system is not None:
                raise ConfigError("--system-prompt has no effect on messages; write it into them, or drop it")
            prompt = line.prompt if isinstance(line.prompt, str) else placed(line.prompt, folder)
        else:
            transcript = Transcript(template, system)
            prompt = _planned(model, tokenizer, transcript, line.prompt, beside, line.where)
            beside = []
        prompts.append(prompt)
        images.append(beside)
    return prompts, images


def _planned(model: Any, tokenizer: Any, transcript: Any, text: str, images: list[str], where: str) -> Any:
    """A text in the chat template, as ids or, with pictures, as what the processor makes of it."""

    def made() -> Any:
        try:
            opened = [read_picture(one, f"the picture {one}") for one in images]
            pictures, twin = Pictures(model, tokenizer, opened), transcript.copy()
            twin.template = pictures.seeing(twin.template)
            return pictures.asked(twin.template, text, lambda asked: twin.plan(asked).new)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    return _Shown(made) if images else made()
