"""Messages as they are typed, pasted or piped in: one line, or several that belong together."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .session import read_line

FENCE = '"""'
PROMPT, MORE = ">> ", ".. "
COMMANDS = {
    "/read FILE": "read a text file, to ask about it",
    "/image FILE": "have a picture go with the next message, before it or where it says <image>",
    "/continue": "go on with an answer that was cut short",
    "/retry": "ask the last message again",
    "/undo": "forget the last message and its answer, or the last file",
    "/stats": "what is remembered, in which memory, and the speed of the last answer",
    "/save FILE": "write the conversation and its cache",
    "/load FILE": "go on with a conversation or a reading that was saved",
    "/reset": "begin a new conversation with an empty cache",
    "/help": "these lines",
    "/quit": "leave, as ctrl-D does",
}
HELP = (
    'A message of several lines: end a line with a backslash, or begin with """ and end with """. '
    "What is pasted into a terminal is one message."
)


def messages() -> Callable[[], str | None]:
    """A function that returns the next message, None at the end of input; on a terminal with editing."""
    return _editor() if sys.stdin.isatty() and sys.stdout.isatty() else read_message


def read_message() -> str | None:
    """A message from lines that are piped in.

    Raises:
        ConfigError: a line is no UTF-8; the next one can be read.
    """
    text = read_line(PROMPT)
    if text is None:
        return None
    while unfinished(text):
        line = read_line(MORE)
        if line is None:
            break
        text = (text if fenced(text) else text[:-1]) + "\n" + line
    return unfenced(text)


def fenced(text: str) -> bool:
    """Whether a message stands between fences."""
    return text.lstrip().startswith(FENCE)


def unfinished(text: str) -> bool:
    """Whether more lines belong to a message."""
    if not fenced(text):
        return text.endswith("\\")
    inside = text.strip()
    return len(inside) < 2 * len(FENCE) or not inside.endswith(FENCE)


def unfenced(text: str) -> str:
    """A message without its fences, if they are whole."""
    if not fenced(text) or unfinished(text):
        return text
    return text.strip()[len(FENCE) : -len(FENCE)].strip("\n")


def _editor() -> Callable[[], str | None]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if not unfinished(buffer.document.text_before_cursor):
            buffer.validate_and_handle()
            return
        if not fenced(buffer.text):
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = _history_file()
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if path is None else FileHistory(str(path)),
        multiline=True,
        key_bindings=keys,
        prompt_continuation=lambda *_: MORE,
        enable_open_in_editor=False,
    )

    def ask() -> str | None:
        try:
            return unfenced(session.prompt(PROMPT))
        except EOFError:
            return None

    return ask


def _history_file() -> Path | None:
    """Where what was typed is kept, readable by its owner only; None where nothing can be written."""
    path = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "mlx-kvret" / "typed"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        return path
    return None


def next_message(ask: Callable[[], str | None]) -> str | None:
    """A message of the user; None at the end of input. Ctrl-C drops what is being typed."""
    while True:
        try:
            return ask()
        except KeyboardInterrupt:
            click.echo("(ctrl-D or /quit leaves)")


def unquoted(name: str) -> str:
    """A file's name as terminals write what is dropped on them: in quotes, or with backslashes."""
    try:
        words = shlex.split(name)
    except ValueError:
        return name
    return words[0] if len(words) == 1 and not os.path.exists(os.path.expanduser(name)) else name
