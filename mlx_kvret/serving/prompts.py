"""From what a client sent to token ids, and the places in them where a snapshot is worth keeping.

They are the end of the system prompt, the prompt before the tail that opens the answer (what a template makes
of the next turn goes on from there, even if it cuts thoughts out of this one), and the prompt but its last
token, so that the same prompt again is read at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..chat_template import Template
from ..chat_template import speaker as speaker
from ..core.picture_prompts import marks, processor_of
from ..core.pictures import runs
from ..core.plain import plain
from ..core.prompts import check_ids, has_chat_template, prompt_ids
from ..errors import ConfigError
from .backend import Backend
from .failures import Refusal
from .job import Prompt
from .pictures import Sights, opened
from .requests import ChatRequest, CompletionRequest, Message, PicturePart

# what apply_chat_template takes for itself
_RESERVED = {
    "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "messages",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
# two users' messages that begin differently, in plain words that no template has a reason to change
_USERS = ("Quorvexa", "brimlotu")


class Prompter:
    """Makes prompts with one tokenizer; one thread at a time.

    Args:
        owner: what must agree for a snapshot to be used: model, gates, eviction options.
        most: tokens that a prompt may have.
        chunk: tokens that a picture may have.
    """

    def __init__(self, tokenizer: Any, backend: Backend, owner: Sequence[str], most: int, chunk: int) -> None:
        self._tokenizer, self._backend, self._owner = tokenizer, backend, tuple(owner)
        self._vocabulary, self._eyes = backend.vocabulary, backend.eyes
        self._most, self._chunk = most, chunk
        self._chats = has_chat_template(tokenizer)
        self.speaker = speaker(tokenizer)
        # templates of some models that see drop contents that are no lists of parts
        probe = [{"role": "user", "content": _USERS[0]}]
        self._lists = bool(self._chats and self._eyes) and _USERS[0] not in self._render(probe, {}, True)

    def completion(self, asked: CompletionRequest) -> Prompt:
        """Text or token ids as they are, with the begin token where text lacks it."""
        given = asked.prompt
        text = given[0] if isinstance(given, list) and given and isinstance(given[0], str) else given
        try:
            ids = prompt_ids(self._tokenizer, text, True, self._vocabulary)
        except ConfigError as error:
            raise Refusal(400, str(error), param="prompt") from None
        self._check_blind(ids, "prompt")
        return self._prompt(ids, [], [], asked.kv_budget, asked.cache_salt)

    def chat(self, asked: ChatRequest) -> Prompt:
        """Messages in the model's chat template, up to where the answer begins."""
        if not self._chats:
            raise Refusal(400, "this model has no chat template; use /v1/completions", param="messages")
        urls = self._urls(asked)
        messages, options = [self._plain(m) for m in asked.messages], self._options(asked)
        if urls:
            return self._seeing(self._render(messages, options, True), urls, asked)
        ids = self._ids(messages, options, True)
        check_ids(ids, self._vocabulary)
        self._check_blind(ids, "messages")
        before_tail = _common(ids, self._ids(messages, options, False))
        system = self._system_end(ids, messages, options)
        return self._prompt(ids, [before_tail], [system], asked.kv_budget, asked.cache_salt)

    def _urls(self, asked: ChatRequest) -> list[str]:
        """Of the pictures, in their order."""
        for message in asked.messages:
            if message.pictures and message.role != "user":
                why = f"a message of role {message.role} holds a picture; give it in one of the user's"
                raise Refusal(400, why, param="messages")
        urls = [url for message in asked.messages for url in message.pictures]
        if urls and not self._eyes:
            raise Refusal(
                400,
                "messages holds a picture (image_url), and this model reads text only, or was opened for "
                "text; this server fetches no URL either: give parts of type text",
                param="messages",
            )
        return urls

    def _seeing(self, text: str, urls: list[str], asked: ChatRequest) -> Prompt:
        """A rendered chat with pictures: read anew each time, so without snapshots."""
        alone, _ = marks(processor_of(self._tokenizer))
        places = text.count(alone)
        if places != len(urls):
            raise Refusal(
                400,
                f"the messages hold {len(urls)} pictures, and {alone}, which stands for one, {places} times "
                "in the model's chat template; leave it out of texts, or change roles or contents",
                param="messages",
            )
        made = self._backend.processed(text, opened(urls))
        ids = [int(token) for token in np.asarray(made["input_ids"]).reshape(-1)]
        check_ids(ids, self._vocabulary)
        pictures = runs(ids, self._eyes)
        if ids[-1] in self._eyes:
            raise Refusal(400, "the messages end with a picture; give text after it", param="messages")
        longest = max(b - a for a, b in pictures)
        if longest > self._chunk:
            raise Refusal(
                400,
                f"a picture of the messages takes {longest:,} tokens, and this server reads {self._chunk:,} "
                "at a time (--chunk), never a part of a picture; make it smaller",
                param="messages",
            )
        prompt = self._prompt(ids, [], [], asked.kv_budget, asked.cache_salt)
        return replace(prompt, marks=frozenset(), sights=Sights(made))

    def _check_blind(self, ids: list[int], param: str) -> None:
        """Refuse tokens of pictures where there are none."""
        if not self._eyes.isdisjoint(ids):
            why = (
                "spells tokens that stand for pictures, and there are none; leave them out, or give pictures"
            )
            raise Refusal(400, f"{param} {why} (image_url, in a chat)", param=param)

    def _plain(self, message: Message) -> dict[str, Any]:
        found = _plain(message)
        if message.pictures or self._lists:
            parts = message.content if isinstance(message.content, list) else [message.content or ""]
            found["content"] = [_part(part) for part in parts]
        return found

    def _options(self, asked: ChatRequest) -> dict[str, Any]:
        """What the template is given besides the messages."""
        options: dict[str, Any] = dict(asked.chat_template_kwargs or {})
        if taken := sorted(_RESERVED & options.keys()):
            raise Refusal(
                400,
                f"chat_template_kwargs holds {', '.join(taken)}, which the server sets itself; drop it",
                param="chat_template_kwargs",
            )
        if asked.reasoning_effort is not None:
            options["reasoning_effort"] = asked.reasoning_effort
        try:
            Template(self._tokenizer, options)
        except ConfigError as error:
            raise Refusal(400, str(error), param="chat_template_kwargs") from None
        if asked.tools and asked.tool_choice != "none":
            options["tools"] = [tool.model_dump(exclude_none=True) for tool in asked.tools]
            probe = [{"role": "user", "content": _USERS[0]}]
            if self._render(probe, options, True) == self._render(probe, options | {"tools": None}, True):
                raise Refusal(400, "this model's chat template knows no tools; drop them", param="tools")
        return options

    def _system_end(self, ids: list[int], messages: list[dict[str, Any]], options: dict[str, Any]) -> int:
        """How many tokens come before the first user's words, if there is a system prompt or tools; else 0.

        What is the same whatever the user says is found by two other users.
        """
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None or (first == 0 and "tools" not in options):
            return 0
        end = len(ids)
        for word in _USERS:
            try:
                other = self._ids([*messages[:first], {"role": "user", "content": word}], options, True)
            except Refusal:
                return 0
            end = min(end, _common(ids, other))
        return end

    def _ids(self, messages: list[dict[str, Any]], options: dict[str, Any], opened: bool) -> list[int]:
        rendered = self._render(messages, options, opened)
        return [int(token) for token in self.speaker.encode(rendered, add_special_tokens=False)]

    def _render(self, messages: list[dict[str, Any]], options: dict[str, Any], opened: bool) -> str:
        try:
            given = json.loads(json.dumps(messages))
            return str(
                self.speaker.apply_chat_template(
                    given, add_generation_prompt=opened, tokenize=False, **options
                )
            )
        except Exception as error:  # a template is a program of its author's
            why = " ".join(plain(f"{type(error).__name__}: {error}", 400).split())
            raise Refusal(
                400,
                f"the model's chat template refuses these messages ({why}); change their roles or contents",
                param="messages",
            ) from None

    def _prompt(
        self, ids: list[int], turns: list[int], systems: list[int], budget: int | None, salt: str | None
    ) -> Prompt:
        if len(ids) > self._most:
            raise Refusal(
                400, f"the prompt has {len(ids):,} tokens; this server reads at most {self._most:,}"
            )
        last = len(ids) - 1
        pinned = frozenset(place for place in systems if 0 < place <= last)
        marks = frozenset(place for place in (*turns, last) if 0 < place <= last) | pinned
        owner = (*self._owner, str(budget or ""), salt or "")
        return Prompt(np.array(ids, np.int32), marks, pinned, owner)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it."""
    # few templates know the newer name
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        found["name"] = message.name
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {
                "name": call.function.name, "arguments": _arguments(call.function.arguments)}}
            for call in message.tool_calls
        ]  # fmt: skip
    return found


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, PicturePart):
        return {"type": "image"}
    return {"type": "text", "text": part if isinstance(part, str) else part.text}


def _arguments(text: str) -> Any:
    """Of a tool call, as templates expect them: a mapping, where they are one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
