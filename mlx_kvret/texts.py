"""Files that are read by a model: texts in UTF-8, checked and of a size that ends, and pictures."""

from __future__ import annotations

import codecs
import os
import sys
from typing import Any, BinaryIO

from .core.images import open_picture
from .errors import ConfigError

# more text than any model reads; what never ends is refused instead of filling the memory
MOST_BYTES = 2**30


def read_text(file: str) -> str:
    """A text file, ``-`` for standard input, ``demo`` for the demo's story.

    Raises:
        ConfigError: it cannot be read, is no text in UTF-8, or does not end.
    """
    if file == "-":
        check_stdin()
        return _decoded("standard input", sys.stdin.buffer)
    path = os.path.expanduser(file)
    if file == "demo" and not os.path.exists(path):
        from .demo import STORY

        path = str(STORY)
    try:
        with open(path, "rb") as stream:
            return _decoded(file, stream)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {file}: {reason}; check the path") from error


def check_stdin() -> None:
    """Refuse to read from a standard input that is closed."""
    if sys.stdin is None:
        raise ConfigError("standard input is closed, so there is nothing to read; pipe text in")


def _decoded(name: str, stream: BinaryIO) -> str:
    decoder, parts, size = codecs.getincrementaldecoder("utf-8-sig")(), [], 0
    while True:
        block = stream.read(2**20)
        if 0 in block:
            raise ConfigError(f"{name} is not text: it holds a zero byte; give text in UTF-8")
        try:
            parts.append(decoder.decode(block, final=not block))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name} is not UTF-8 text ({error.reason}); convert it first") from error
        size += len(block)
        if size > MOST_BYTES:
            raise ConfigError(f"{name} has more than {MOST_BYTES:,} bytes; give a part of it")
        if not block:
            return "".join(parts).replace("\r\n", "\n").replace("\r", "\n")


def read_picture(name: str, what: str) -> Any:
    """A picture file as a PIL image; ``demo`` is the one that comes with the package.

    Raises:
        ConfigError: it cannot be read, or would have to be fetched.
    """
    if name == "demo" and not os.path.exists(name):
        from .demo import VISION_SAMPLE

        return open_picture(VISION_SAMPLE, what)
    return open_picture(name, what)
