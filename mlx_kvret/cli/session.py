"""What commands that run a model have in common: loading, prompts, progress, what is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..core.plain import plain, spoken
from ..core.sampling import Sampling
from ..errors import ConfigError
from ..texts import MOST_BYTES
from .ending import leaving_at_once
from .options import check_sampling


def load(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer from a command's ``model``, ``gates`` and ``backend``, which are taken out."""
    check_sampling(options)
    with leaving_at_once():
        from ..api import load

        gates = options.pop("gates")
        return load(options.pop("model"), None if gates == "none" else gates, backend=options.pop("backend"))


def sampling(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Generation options of the model's backend from ``temp``, ``top_p`` and ``seed``, taken out."""
    from ..api import backend_of

    asked = Sampling(options.pop("temp"), options.pop("top_p"), options.pop("seed"))
    found: dict[str, Any] = backend_of(model).sampling(model, asked)
    return found


def read_line(prompt: str) -> str | None:
    """A line typed or piped in, None at the end.

    Raises:
        ConfigError: the line is no UTF-8; the next one can be read.
    """
    if sys.stdin.isatty():
        try:
            return input(prompt)
        except EOFError:
            click.echo()
            return None
        except UnicodeDecodeError as error:
            raise ConfigError(f"the line is not UTF-8 ({error.reason}); set the terminal to UTF-8") from error
    click.echo(prompt, nl=False)
    line = sys.stdin.buffer.readline(MOST_BYTES)
    if not line:
        click.echo()
        return None
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the line is not UTF-8 ({error.reason}); convert what is piped in") from error


def say(text: str, nl: bool = False) -> None:
    """Print what a model says: its line breaks and tabs, but no control character that a terminal obeys."""
    click.echo(spoken(text), nl=nl)


def note(text: str, err: bool = False) -> None:
    """Print a remark of ours, which may quote a file."""
    click.echo(plain(text), err=err)


@contextmanager
def prefill_progress() -> Iterator[Callable[[int, int], None]]:
    """A callback (tokens read, tokens in all) that draws a bar on stderr while a long prompt is read."""
    bar: Any = None

    def advance(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and total > 1 and sys.stderr.isatty():
            bar = click.progressbar(length=total, label="reading", file=sys.stderr)
            bar.__enter__()
        if bar is not None:
            bar.update(done - bar.pos)
            if done >= total:
                finish()

    def finish() -> None:
        nonlocal bar
        if bar is not None:
            bar.__exit__(None, None, None)
            bar = None

    try:
        yield advance
    finally:
        finish()


def cut_note(last: Any, max_tokens: int) -> None:
    """Say on stderr that an answer did not end by itself."""
    if last is not None and last.finish_reason == "length":
        note(f"[cut by --max-tokens {max_tokens}]", err=True)


def stats_line(model: Any, cache: Any, last: Any) -> str:
    """The closing line: speed, tokens kept per head, and the memory of this cache and of a full one."""
    from ..api import backend_of

    backend = backend_of(model)
    heads, full = backend.full_cache(model, cache)
    return (
        f"[{last.prompt_tokens} prompt tokens at {last.prompt_tps:.0f}/s, "
        f"{last.generation_tokens} generated at {last.generation_tps:.1f}/s; "
        f"kept {cache.entries / heads:,.0f} of {cache.seen:,} tokens per head; "
        f"{cache.nbytes / 1e6:.2f} MB of KV allocated, by a full cache {full / 1e6:.2f} MB]"
    )
