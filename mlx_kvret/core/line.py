"""Messages of the first of several ranks to the others, over what their sums go over."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import ConfigError, KVRetError
from .ranks import Ranks

# of a message that goes in one round, 32-bit words with the one that says how long it is
WORDS = 64
# seconds between two words where nothing happens, so that nobody waits in vain for one that is gone
PAUSE = 0.05


class Line:
    """Messages of the first rank to all, and what became of them; all ranks make the same calls."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def say(self, message: Any = None) -> Any:
        """The first rank's message, on every rank."""
        data = json.dumps(message).encode() if self.ranks.rank == 0 else b""
        room = 4 * (WORDS - 1)
        begun = self.ranks.first(_words(len(data).to_bytes(4, "little") + data[:room], WORDS))
        size = int(begun[0])
        found = begun[1:].tobytes()[:size]
        if size > room:
            rest = self.ranks.first(_words(data[room:], -(-(size - room) // 4)))
            found += rest.tobytes()[: size - room]
        return json.loads(found)

    def told(self, action: Callable[[], Any]) -> Any:
        """What the first rank's ``action`` gives, something that a message can hold, on every rank.

        Raises:
            KVRetError: what it raises there, and its message on the others.
        """
        error: KVRetError | None = None
        said: Any = None
        if self.ranks.rank == 0:
            try:
                said = [True, action()]
            except KVRetError as raised:
                error, said = raised, [False, str(raised)]
        done, found = self.say(said)
        if error is not None:
            raise error
        if not done:
            raise ConfigError(found)
        return found

    def heard(self, failed: bool, leaving: bool) -> tuple[list[int], bool]:
        """Which ranks have failed at what was said last, and whether any has been told to end."""
        own = np.zeros(self.ranks.size + 1, np.int32)
        own[self.ranks.rank], own[-1] = failed, leaving
        found = self.ranks.sum(own)
        return np.flatnonzero(found[:-1]).tolist(), bool(found[-1])


def _words(data: bytes, count: int) -> Any:
    return np.frombuffer(data.ljust(4 * count, b"\0"), "<i4")[:count]
