"""What the library logs, as lines on stderr while a command runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..core.plain import plain


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(plain(record.getMessage()).split())
        click.echo(f"warning: {text}" if record.levelno >= logging.WARNING else text, err=True)


@contextmanager
def notices() -> Iterator[None]:
    """Show the library's log, information included."""
    log, lines = logging.getLogger("mlx_kvret"), _Lines()
    before = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(before)
