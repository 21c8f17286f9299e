"""Where in an answer the model thinks, calls a tool or speaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

CONTENT, REASONING = "content", "reasoning"


@dataclass
class Said:
    """What one or more tokens added to an answer."""

    content: str = ""
    reasoning: str = ""
    # name and arguments, as JSON text
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Said) -> None:
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class Splitter(Protocol):
    """Takes an answer's text as it comes."""

    def add(self, text: str) -> Said: ...

    def end(self) -> Said:
        """What still waited."""


class Plain:
    """A model without marks: everything is content."""

    def add(self, text: str) -> Said:
        return Said(text)

    def end(self) -> Said:
        return Said()


class Calls:
    """The text of tool calls, parsed when a call is complete; what is no call is content again.

    Args:
        parse: from the text between the marks to one or several calls with a name and arguments.
        marks: what stands before and behind a call.
    """

    def __init__(self, parse: Callable[[str], Any], marks: tuple[str, str]) -> None:
        self._parse, self._marks, self._text = parse, marks, ""

    def add(self, text: str) -> None:
        self._text += text

    def end(self) -> Said:
        """The call that is over now, if one was under way."""
        text, self._text = self._text, ""
        if not text.strip():
            return Said()
        try:
            found = self._parse(text)
            calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
        except Exception:  # each model family has a parser of its own, and the text is the model's
            return Said(self._marks[0] + text + self._marks[1])
        return Said(calls=calls)


def _call(found: Any) -> tuple[str, str]:
    name, arguments = str(found["name"]), found.get("arguments", {})
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
