"""What the library logs, as lines on stderr while a command runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..core.plain import plain

# transformers and the hub ask it when they are imported
_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(plain(record.getMessage()).split())
        click.echo(f"warning: {text}" if record.levelno >= logging.WARNING else text, err=True)


@contextmanager
def notices() -> Iterator[None]:
    """Show the library's log, information included; others' progress bars only to a terminal."""
    log, lines = logging.getLogger("mlx_kvret"), _Lines()
    before, quiet = log.level, _BARS not in os.environ and not sys.stderr.isatty()
    if quiet:
        os.environ[_BARS] = "1"
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(before)
        if quiet:
            del os.environ[_BARS]
