"""A talk in several processes: the first one hears the user and decides, the others follow in silence."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..conversation import Turn
from ..core.launched import launched
from ..core.line import PAUSE, Line
from ..core.ranks import Ranks
from ..core.watch import STATUS
from ..errors import ConfigError, KVRetError, RankLost
from .ending import stoppable, tell

# tokens between two questions whether to stop, for an answer waits for the device of all
SELDOM = 8


class Company:
    """The processes that hold a model together, or this one alone where ``ranks`` is None.

    ``every`` is after how many tokens of an answer to ask whether to stop.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._line = None if ranks is None else Line(ranks)
        self.first = ranks is None or ranks.rank == 0
        self.every = 1 if ranks is None else SELDOM
        if not self.first:
            # ctrl-C is the first one's affair
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            _drop_input()

    def hear(self, ask: Callable[[], str | None]) -> str | None:
        """What the user says to the first process; None at the end.

        Raises:
            ConfigError: it cannot be read.
            RankLost: a process is gone.
        """
        if self._line is None:
            return ask()
        if not self.first:
            while (found := self._line.say()) is None:
                time.sleep(PAUSE)
        else:
            found = self._asked(self._line, ask)
            self._line.say(found)
        said, text = found
        if not said:
            raise ConfigError(text)
        return None if text is None else str(text)

    def _asked(self, line: Line, ask: Callable[[], str | None]) -> tuple[bool, str | None]:
        """What the user says, while the others are told that nothing was said yet."""
        over = threading.Event()

        def beat() -> None:
            try:
                while not over.wait(PAUSE):
                    line.say(None)
            except RankLost as error:
                # nothing else ends a wait for a line
                tell(error)
                os._exit(STATUS)

        thread = threading.Thread(target=beat, name="kvret-beat", daemon=True)
        thread.start()
        try:
            return True, ask()
        except KVRetError as error:
            return False, str(error)
        finally:
            over.set()
            thread.join()

    def told(self, action: Callable[[], Any]) -> Any:
        """What an action of the first process gives, text say, to all of them. Raises what it raises."""
        return action() if self._line is None else self._line.told(action)

    def agree(self, plan: Callable[[], Turn]) -> Turn:
        """A turn that all have planned, of the same tokens everywhere.

        Raises:
            RankError: it is not, or another one refuses it. What this one's ``plan`` raises.
        """
        if self._line is None:
            return plan()
        ranks, found = self._line.ranks, list[Turn]()
        ranks.agreed(lambda: found.append(plan()))
        (turn,) = found
        ranks.alike(
            zlib.crc32(np.array(turn.new, np.int32).tobytes()),
            "the chat template gives other tokens than on the first machine; set the clocks alike, and have "
            "the same model everywhere",
        )
        return turn

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[Callable[[], bool]]:
        """As :func:`.ending.stoppable`: whether ctrl-C came to the first process, which all must ask."""
        line = self._line
        if line is None:
            with stoppable() as stop:
                yield stop
            return
        with stoppable() if self.first else contextlib.nullcontext(bool) as stop:
            yield lambda: bool(line.ranks.first(np.array([stop()], np.int32))[0])


def _drop_input() -> None:
    """Take what mlx.launch passes on to every process, or it would fill up; torchrun's is the first one's."""
    found = launched()
    if found is not None and found.launcher == "mlx.launch" and sys.stdin is not None:
        threading.Thread(target=_drain, args=(sys.stdin.fileno(),), name="kvret-input", daemon=True).start()


def _drain(number: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(number, 1 << 16):
            pass
