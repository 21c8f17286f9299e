"""``mlx-kvret chat``: one bounded cache for the whole conversation."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import CacheError, ConfigError, KVRetError
from ..texts import check_stdin
from . import options as shared
from .ending import tell
from .habits import older_names, refusals
from .session import (
    cut_note,
    load,
    note,
    prefill_progress,
    read_line,
    required,
    sampling,
    say,
    stats_line,
    template_of,
)

COMMANDS = {
    "/stats": "speed of the last answer, tokens kept, KV memory",
    "/save FILE": "write the conversation and its cache",
    "/load FILE": "go on with a conversation that was saved",
    "/reset": "begin a new conversation with an empty cache",
    "/help": "these lines",
    "/quit": "leave, as ctrl-D does",
}
_TAKES_FILE = {name.split()[0]: " " in name for name in COMMANDS}


@click.command("chat")
@shared.model_options
@shared.prompt_options
@shared.eviction_options
@shared.sampling_options
@refusals
@older_names("--system")
def command(**options: Any) -> None:
    """Talk to a model within a fixed KV budget.

    The cache lives across turns, so a turn costs only its new tokens and the conversation has no end. What
    the model said stays as it was said, also where its chat template would shorten it (thoughts, say).

    Commands: /stats, /save FILE, /load FILE, /reset, /help, /quit. Any other line is text for the model, and
    so is one that begins with a space. Ctrl-C stops an answer (twice: leaves at once), ctrl-D leaves.

    \b
    Examples:
      mlx-kvret chat --model demo --budget 64
      mlx-kvret chat --model mlx-community/Qwen3-4B-4bit --gates ./gates --budget 1024
    """
    evict = shared.eviction(options)
    check_stdin()
    model, tokenizer = load(options)
    template = template_of(required(tokenizer), options)
    conversation = Conversation(model, tokenizer, options.pop("system_prompt"), evict, template)
    draw = sampling(model, tokenizer, options)
    draw |= {name: options[name] for name in ("max_tokens", "prefill_step_size")}
    budget = settings(conversation.cache).get("budget")
    kept = "every token" if budget is None else f"up to {budget:,} tokens per head"
    note(f"Commands: {'  '.join(COMMANDS)}. The cache keeps {kept}.", err=True)
    with history():
        while True:
            try:
                line = next_line()
                if line is None or not conversation.take(line, draw):
                    break
            except KVRetError as error:
                tell(error)


class Conversation:
    """A transcript, and the cache that has read it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None,
        eviction: dict[str, Any],
        template: Any = None,
    ) -> None:
        self.model, self.tokenizer, self.system, self.eviction = model, tokenizer, system, eviction
        # the tokenizer's chat template, with settings of its own
        self.template = tokenizer if template is None else template
        self.reset()

    def reset(self) -> None:
        from ..api import make_cache
        from ..conversation import Transcript

        self.transcript = Transcript(self.template, self.system)
        self.cache = make_cache(self.model, **self.eviction)
        self.last: Any = None

    def take(self, line: str, options: dict[str, Any]) -> bool:
        """A line that was typed: one of our commands, or text for the model. False ends the conversation."""
        name, *argument = line.split(maxsplit=1) if line.startswith("/") else [""]
        if name in _TAKES_FILE:
            return self.run(name, "".join(argument).rstrip())
        if line.strip():
            self.turn(line, options)
        return True

    def turn(self, text: str, options: dict[str, Any]) -> None:
        """Read what is new, answer, and remember both; what was read before a failure is remembered too.

        Raises:
            ConfigError: the chat template refuses the turn; the conversation is as before.
            CacheError: the cache has read something else than the conversation.
        """
        from ..api import stream_generate

        if self.cache.seen != len(self.transcript):
            raise CacheError(
                f"the cache has read {self.cache.seen} tokens, the conversation has {len(self.transcript)}; "
                "begin anew with /reset"
            )
        planned = self.transcript.plan(text)
        before, said, answer, last = self.cache.seen, [], "", None
        with prefill_progress() as progress, stoppable() as stop:

            def advance(done: int, total: int) -> None:
                progress(done, total)
                if done < total and stop():
                    raise Stopped

            stream: Any = stream_generate(
                self.model,
                self.tokenizer,
                planned.new,
                cache=self.cache,
                prompt_progress_callback=advance,
                **options,
            )
            try:
                for last in stream:
                    said.append(last.token)
                    answer += last.text
                    say(last.text)
                    if last.finish_reason is None and stop():
                        break
            except Stopped:
                pass
            finally:
                if hasattr(stream, "close"):
                    stream.close()
                read, ended = self.cache.seen - before, last is not None and last.finish_reason == "stop"
                self.transcript.account(planned, read, said, answer, ended)
        if last is None:
            note(f"[stopped after {read} of {len(planned.new)} tokens were read]")
            return
        self.last = last
        click.echo(" [stopped]" if last.finish_reason is None else "")
        cut_note(last, options["max_tokens"])

    def run(self, name: str, argument: str = "") -> bool:
        """One of our commands; False ends the conversation.

        Raises:
            ConfigError: it lacks its file, or has something behind it that it does not take.
        """
        if bool(argument) != _TAKES_FILE[name]:
            wrong = f"{name} takes nothing behind it" if argument else f"{name} needs a file behind it"
            raise ConfigError(f"{wrong}; to say this to the model, begin the line with a space")
        if name == "/reset":
            self.reset()
            note("[a new conversation; the cache is empty]")
        elif name == "/stats":
            self.show()
        elif name == "/help":
            note("\n".join(f"{name:<12}{what}" for name, what in COMMANDS.items()))
            note("Any other line is text for the model; so is one of these behind a space.")
        elif argument:
            (self.save if name == "/save" else self.load)(Path(os.path.expanduser(argument)))
        return name != "/quit"

    def show(self) -> None:
        if self.last is None:
            note(f"[nothing read yet; KV {self.cache.nbytes / 1e6:.2f} MB]")
        else:
            note(stats_line(self.model, self.cache, self.last))

    def save(self, path: Path) -> None:
        from ..api import save_cache

        save_cache(self.model, self.cache, path, self.transcript.notes())
        note(f"[saved {self.cache.seen} tokens of conversation to {path}]")

    def load(self, path: Path) -> None:
        """Go on with a saved conversation, its options and its system message.

        Raises:
            CheckpointError, ModelMismatchError: it cannot go on here; the conversation is as before.
        """
        from ..api import load_cache
        from ..conversation import Transcript

        cache, notes = load_cache(self.model, path)
        transcript = Transcript.resumed(self.template, notes, cache.seen)
        before = settings(self.cache)
        self.transcript, self.cache, self.last = transcript, cache, None
        note(f"[loaded {cache.seen} tokens of conversation]")
        found = settings(cache)
        if found != before:
            differs = {name: value for name, value in found.items() if value != before.get(name)}
            said = ", ".join(f"{name} {value}" for name, value in differs.items())
            note(f"[it goes on with {said}, as it was saved; /reset goes back to this session's options]")
        if transcript.system != self.system:
            own = (
                "no system message" if transcript.system is None else f"system message {transcript.system!r}"
            )
            note(f"[it goes on with {own}, as it was saved]")


def settings(cache: Any) -> dict[str, Any]:
    """The eviction options a cache was made with."""
    return {"policy": "full"} if cache.shared is None else dict(cache.shared.config.to_dict())


class Stopped(Exception):
    """Ctrl-C between two chunks of a prompt."""


def next_line() -> str | None:
    """A line typed by the user; None at the end of input."""
    while True:
        try:
            return read_line(">> ")
        except KeyboardInterrupt:
            click.echo("\n(ctrl-D or /quit leaves)")


@contextlib.contextmanager
def stoppable() -> Iterator[Any]:
    """Ctrl-C asks for a stop after the current token, so that the cache stays whole; yields the question."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Line editing, and what was typed before, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "mlx-kvret" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(state)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            state.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(state)
