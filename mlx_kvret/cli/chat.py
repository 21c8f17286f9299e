"""``mlx-kvret chat``: one bounded cache for the whole conversation."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError, KVRetError
from . import options as shared
from .session import interruptible, load, prefill_progress, sampling, stats_line

COMMANDS = "/stats  /save FILE  /load FILE  /reset  /quit"


@click.command("chat")
@shared.model_options
@click.option("--system", help="System message.")
@shared.eviction_options
@shared.sampling_options
@interruptible()
def command(**options: Any) -> None:
    """Talk to a model within a fixed KV budget.

    The cache lives across turns, so a turn costs only its new tokens and the conversation has no end.
    Commands: /stats, /save FILE, /load FILE, /reset, /quit. Ctrl-C stops an answer (twice: leaves at once),
    ctrl-D leaves.

    \b
    Examples:
      mlx-kvret chat --model demo --budget 64
      mlx-kvret chat --model mlx-community/Qwen3-4B-4bit --gates ./gates --budget 1024
    """
    evict = shared.eviction(options)
    model, tokenizer = load(options)
    if tokenizer is None or tokenizer.chat_template is None:
        raise ConfigError("this model has no chat template; use `mlx-kvret generate` with it")
    conversation = Conversation(model, tokenizer, options.pop("system"), evict)
    draw = sampling(model, options) | {"max_tokens": options["max_tokens"]}
    click.echo(f"Commands: {COMMANDS}. The cache holds {conversation.cache.entries} entries.", err=True)
    with history():
        while (line := read_line()) is not None:
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if not conversation.run(*line.split(maxsplit=1)):
                        break
                else:
                    conversation.turn(line, draw)
            except KVRetError as error:
                click.echo(f"error: {error}", err=True)


class Conversation:
    """Messages, the cache that has read them, and the exact text that is in it."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, eviction: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.system, self.eviction = model, tokenizer, system, eviction
        self.reset()

    def reset(self) -> None:
        from ..api import make_cache

        self.cache = make_cache(self.model, **self.eviction)
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.context = ""
        self.last: Any = None

    def turn(self, text: str, options: dict[str, Any]) -> None:
        """Read what is new, answer, and remember both."""
        from ..api import stream_generate

        self.messages.append({"role": "user", "content": text})
        new = self.new_text()
        ids = self.tokenizer.encode(new, add_special_tokens=False)
        answer, interrupted = "", False
        with prefill_progress() as progress, stoppable() as stop:

            def advance(done: int, total: int) -> None:
                progress(done, total)
                if done < total and stop():
                    raise Stopped(done)

            stream: Any = stream_generate(
                self.model,
                self.tokenizer,
                ids,
                cache=self.cache,
                prompt_progress_callback=advance,
                **options,
            )
            try:
                for self.last in stream:
                    answer += self.last.text
                    click.echo(self.last.text, nl=False)
                    if interrupted := stop():
                        stream.close()
                        break
            except Stopped as stopped:
                click.echo(f"[stopped after {stopped.read} of {len(ids)} tokens were read]")
                self.messages.pop()
                self.context += self.tokenizer.decode(ids[: stopped.read])
                return
        click.echo(" [stopped]" if interrupted else "")
        self.messages.append({"role": "assistant", "content": answer})
        ended = self.last is not None and self.last.finish_reason == "stop"
        self.context += new + answer + (self.tokenizer.decode([self.last.token]) if ended else "")

    def new_text(self) -> str:
        """What the model has not read yet: the template's text beyond what is in the cache."""
        whole = self._rendered(self.messages)
        if whole.startswith(self.context):
            return whole[len(self.context) :]
        # templates that rewrite earlier turns (dropping thoughts, say): the last message alone
        alone, bos = self._rendered(self.messages[-1:]), self.tokenizer.bos_token
        return alone.removeprefix(bos) if bos else alone

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return str(text)

    def run(self, name: str, argument: str = "") -> bool:
        """A command; False ends the conversation."""
        if name == "/quit":
            return False
        if name == "/reset":
            self.reset()
        elif name == "/stats":
            self.show()
        elif name in ("/save", "/load") and argument:
            (self.save if name == "/save" else self.load)(Path(argument.strip()).expanduser())
        else:
            raise ConfigError(f"{name} is no command here, or lacks its file; there are {COMMANDS}")
        return True

    def show(self) -> None:
        from ..api import wing_of

        if self.last is None:
            click.echo(f"[nothing read yet; KV {self.cache.nbytes / 1e6:.2f} MB]")
        else:
            click.echo(stats_line(self.last, wing_of(self.model).full_nbytes(self.model, self.cache.seen)))

    def save(self, path: Path) -> None:
        from ..api import save_cache

        notes = {"messages": json.dumps(self.messages), "context": self.context}
        save_cache(self.model, self.cache, path, notes)
        click.echo(f"[saved {self.cache.seen} tokens of conversation to {path}]")

    def load(self, path: Path) -> None:
        from ..api import load_cache

        cache, notes = load_cache(self.model, path)
        self.messages = json.loads(notes.get("messages", "[]"))
        self.cache, self.context, self.last = cache, notes.get("context", ""), None
        click.echo(f"[loaded {self.cache.seen} tokens of conversation]")


class Stopped(Exception):
    """Ctrl-C between two chunks of a prompt, of which ``read`` tokens are in the cache."""

    def __init__(self, read: int) -> None:
        self.read = read


def read_line() -> str | None:
    """A line typed by the user; None at the end of input."""
    while True:
        try:
            return input(">> ")
        except EOFError:
            click.echo()
            return None
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
