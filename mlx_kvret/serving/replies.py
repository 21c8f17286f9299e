"""Answers as OpenAI's clients read them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .channels import Said
from .job import Likely, Piece, Usage

DONE = b"data: [DONE]\n\n"
# keeps a connection open while a long prompt is read
WAITING = b": waiting\n\n"


def event(found: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.answer,
        "total_tokens": usage.prompt + usage.answer,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        "kv_entries": usage.kv_entries,
        "kv_bytes": usage.kv_bytes,
    }


@dataclass
class Reply:
    """What the answers to both kinds of request have in common.

    Args:
        model: its name.
        decode: text of token ids.
        usage: whether a stream closes with what the answer took.
    """

    model: str
    decode: Callable[[list[int]], str]
    usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    kind = chunk_kind = prefix = ""

    def body(self, pieces: list[Piece]) -> dict[str, Any]:
        """The whole answer."""
        said, likely = Said(), list[Likely]()
        for piece in pieces:
            said.add(piece.said)
            likely += piece.likely
        last = pieces[-1]
        assert last.usage is not None
        choice = self.choice(said, likely, self.reason(last, said.calls))
        found = self._head(self.kind) | {"choices": [choice], "usage": usage_of(last.usage)}
        return found | ({} if last.shown is None else {"kv_history": last.shown()})

    def first(self) -> list[bytes]:
        """Events before any token."""
        return []

    def events(self, piece: Piece) -> Iterable[bytes]:
        """A piece as events of a stream."""
        yield from self.news(piece)
        if piece.shown is not None:
            yield self._chunk([], kv_history=piece.shown())
        if piece.usage is not None and self.usage:
            yield self._chunk([], usage=usage_of(piece.usage))

    def news(self, piece: Piece) -> Iterable[bytes]:
        raise NotImplementedError

    def choice(self, said: Said, likely: list[Likely], reason: str) -> dict[str, Any]:
        raise NotImplementedError

    def reason(self, piece: Piece, calls: list[tuple[str, str]]) -> str:
        return piece.reason or "stop"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        more = ({"usage": None} if self.usage else {}) | more
        return event(self._head(self.chunk_kind) | {"choices": choices} | more)


@dataclass
class ChatReply(Reply):
    """``chat.completion``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __post_init__(self) -> None:
        self._called = 0

    def first(self) -> list[bytes]:
        return [self._delta({"role": "assistant", "content": ""})]

    def choice(self, said: Said, likely: list[Likely], reason: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.content or None, "refusal": None}
        if not said.calls:
            message["content"] = said.content
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_call(name, arguments) for name, arguments in said.calls]
        found = {"index": 0, "message": message, "finish_reason": reason}
        return found | {"logprobs": self._logprobs(likely) if likely else None}

    def news(self, piece: Piece) -> Iterable[bytes]:
        said, delta = piece.said, dict[str, Any]()
        if said.content:
            delta["content"] = said.content
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.calls:
            numbered = enumerate(said.calls, self._called)
            delta["tool_calls"] = [_call(name, arguments) | {"index": i} for i, (name, arguments) in numbered]
            self._called += len(said.calls)
        if delta or piece.likely:
            yield self._delta(delta, logprobs=self._logprobs(piece.likely) if piece.likely else None)
        if piece.reason is not None:
            yield self._delta({}, self.reason(piece, said.calls))

    def reason(self, piece: Piece, calls: list[tuple[str, str]]) -> str:
        called = bool(calls) or self._called > 0
        return "tool_calls" if called and piece.reason == "stop" else super().reason(piece, calls)

    def _delta(self, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}])

    def _logprobs(self, likely: list[Likely]) -> dict[str, Any]:
        def shown(token: int, logprob: float) -> dict[str, Any]:
            text = self.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            shown(one.token, one.logprob) | {"top_logprobs": [shown(*pair) for pair in one.top]}
            for one in likely
        ]
        return {"content": content, "refusal": None}


@dataclass
class CompletionReply(Reply):
    """``text_completion``."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __post_init__(self) -> None:
        self._offset = 0

    def choice(self, said: Said, likely: list[Likely], reason: str | None) -> dict[str, Any]:
        text = said.reasoning + said.content
        found = {"index": 0, "text": text, "finish_reason": reason}
        return found | {"logprobs": self._logprobs(likely) if likely else None}

    def news(self, piece: Piece) -> Iterable[bytes]:
        yield self._chunk([self.choice(piece.said, piece.likely, piece.reason)])

    def _logprobs(self, likely: list[Likely]) -> dict[str, Any]:
        texts, offsets = [self.decode([one.token]) for one in likely], []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in likely],
            "top_logprobs": [{self.decode([token]): value for token, value in one.top} for one in likely],
            "text_offset": offsets,
        }


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
