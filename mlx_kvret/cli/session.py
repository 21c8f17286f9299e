"""What commands that run a model have in common: loading, prompts, progress, a clean end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError


def load(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer from a command's ``model``, ``gates`` and ``backend``, which are taken out."""
    from ..api import load

    return load(options.pop("model"), options.pop("gates"), backend=options.pop("backend"))


def sampling(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Generation options of the model's wing from ``temp``, ``top_p`` and ``seed``, taken out."""
    from ..api import wing_of

    found: dict[str, Any] = wing_of(model).sampling(
        options.pop("temp"), options.pop("top_p"), options.pop("seed")
    )
    return found


def read_text(file: str) -> str:
    """A text file, ``-`` for standard input, ``demo`` for the demo's story."""
    if file == "-":
        return sys.stdin.read()
    path = Path(file).expanduser()
    if file == "demo" and not path.exists():
        from ..demo import STORY

        path = STORY
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text; convert it first") from error


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


@contextmanager
def interruptible() -> Iterator[None]:
    """End on ctrl-C with a line break and status 130, as a shell expects."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(130)


def stats_line(last: Any, full_nbytes: int) -> str:
    """The closing line: speed, kept of seen, and KV memory against the full cache's."""
    return (
        f"[{last.prompt_tokens} prompt tokens at {last.prompt_tps:.0f}/s, "
        f"{last.generation_tokens} generated at {last.generation_tps:.1f}/s; "
        f"kept {last.entries:,} entries of {last.seen:,} tokens; "
        f"KV {last.cache_nbytes / 1e6:.2f} MB, full cache {full_nbytes / 1e6:.2f} MB]"
    )
