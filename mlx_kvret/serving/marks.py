"""Thoughts and tool calls by mlx-lm's own marks and parsers, which compute nothing: for either backend."""

from __future__ import annotations

import importlib
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper, _infer_tool_parser

from .channels import Calls, Plain, Said, Splitter


def splitter(tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> Splitter:
    """What finds thoughts and tool calls in the answer to a prompt; ``tokenizer`` is mlx-lm's wrapper."""
    if not tokenizer.has_thinking and not tools and not tokenizer.response_transitions:
        return Plain()
    return Marked(tokenizer, ids, tools)


def wrapped(tokenizer: Any) -> Any:
    """mlx-lm's wrapper of a tokenizer of transformers, with the parser that mlx-lm would choose for it."""
    name = tokenizer.init_kwargs.get("tool_parser_type") or _infer_tool_parser(tokenizer)
    if name is None:
        return TokenizerWrapper(tokenizer, _silent)
    found = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return TokenizerWrapper(
        tokenizer,
        _silent,
        tool_parser=found.parse_tool_call,
        tool_call_start=found.tool_call_start,
        tool_call_end=found.tool_call_end,
    )


def _silent(tokenizer: Any) -> None:
    """In place of mlx-lm's detokenizer, which is not asked for anything."""


class Marked:
    """Thoughts and tool calls by mlx-lm's own state machine and parsers."""

    def __init__(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> None:
        self._state = make_text_state_machine(tokenizer).make_state(_initial(tokenizer, ids))
        self._calls: Calls | None = None
        if tokenizer.has_tool_calling:
            marks = (tokenizer.tool_call_start, tokenizer.tool_call_end or "")
            self._calls = Calls(lambda text: tokenizer.tool_parser(text, tools), marks)

    def add(self, text: str) -> Said:
        self._state, parts = TextStateMachine.split(self._state, text)
        return self._said(parts)

    def end(self) -> Said:
        self._state, text, state = TextStateMachine.flush(self._state)
        said = self._said([(state or "normal", text)])
        if self._calls is not None:
            said.add(self._calls.end())
        return said

    def _said(self, parts: list[tuple[str, str]]) -> Said:
        said = Said()
        for state, text in parts:
            if state == "tool" and self._calls is not None:
                self._calls.add(text)
                continue
            if self._calls is not None:
                said.add(self._calls.end())
            said.add(Said(reasoning=text) if state == "reasoning" else Said(text))
        return said


def _initial(tokenizer: Any, ids: list[int]) -> str:
    """Whether the prompt left a thought open."""
    if tokenizer.response_initial_state:
        return str(tokenizer.response_initial_state)
    opened = tokenizer.has_thinking and tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids)
    return "reasoning" if opened else "normal"
