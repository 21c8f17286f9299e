"""Many prompts from a file of JSON lines, answered side by side: what ``generate --prompts`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.options import short
from ..core.request import check_max_tokens
from ..errors import ConfigError
from ..texts import read_text
from .session import chosen_template, drawn, load, required, say

KNOWN = ("prompt", "messages", "budget", "max_tokens", "id")


@dataclass(frozen=True)
class Asked:
    """A line of the file: a prompt, and what it wants other than the rest."""

    prompt: str | list[Any]
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
        most = found.get("max_tokens", max_tokens)
        check_max_tokens(most)
        return cls(prompt, found.get("budget", budget), most, found.get("id"))


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
    prompts = _prompts(asked, required(tokenizer), options)
    draw = drawn(model, tokenizer, options)
    texts = [""] * len(asked)
    for one in stream_batch(
        model,
        tokenizer,
        prompts,
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


def _prompts(asked: list[Asked], tokenizer: Any, options: dict[str, Any]) -> list[Any]:
    """What the model reads for each line, as ``generate`` reads a prompt."""
    from ..conversation import Transcript

    template, system = chosen_template(tokenizer, options), options.pop("system_prompt")
    if template is None:
        return [line.prompt for line in asked]
    texts = [line.prompt for line in asked]
    if system is not None and not all(isinstance(text, str) for text in texts):
        raise ConfigError("--system-prompt has no effect on messages; write it into them, or drop it")
    return [Transcript(template, system).plan(text).new if isinstance(text, str) else text for text in texts]
