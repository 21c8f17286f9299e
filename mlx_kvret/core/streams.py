"""Streams of answers that nobody has read to the end when the program ends.

They are closed while the modules that they need for it are there: Python would empty those first.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar
from weakref import WeakSet

Item = TypeVar("Item")


def closed_at_exit(stream: Iterator[Item]) -> Iterator[Item]:
    """The same generator, closed at the end of the program if it is still there."""
    _open().add(stream)
    return stream


@functools.cache
def _open() -> WeakSet[Any]:
    streams: WeakSet[Any] = WeakSet()
    # what is registered last is called first: before the backends, which are loaded by now, let go
    atexit.register(_close, streams)
    return streams


def _close(streams: WeakSet[Any]) -> None:
    for stream in list(streams):
        # another thread may be in it, and nobody will look at the cache that it would put in order
        with contextlib.suppress(Exception):
            stream.close()
