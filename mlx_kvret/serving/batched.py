"""Rows that decode in one pass: either backend's batch generator; :class:`.engine.OneByOne` is its twin."""

from __future__ import annotations

from typing import Any

from ..core.options import MAX_SEED
from .backend import Backend, Choose
from .engine import Step


class Batched:
    """As :class:`.engine.Engine`. A generator ends no row by itself here: who decides sees the text."""

    def __init__(self, backend: Backend, rows: int) -> None:
        self._backend, self._rows, self.leaving = backend, rows, False
        self._in = set[int]()
        self._generator: Any = None

    def join(self, cache: Any, token: int, choose: Choose) -> int:
        if self._generator is None:
            # only now, in the thread that decodes
            self._generator = self._backend.generator(self._rows)
        (row,) = self._generator.insert([[token]], [MAX_SEED], caches=[cache], samplers=[choose])
        self._in.add(row)
        return int(row)

    def step(self) -> list[Step]:
        if not self._in:
            return []
        return [Step(r.uid, int(r.token), r.logprobs) for r in self._generator.next_generated()]

    def leave(self, row: int) -> Any:
        self._in.discard(row)
        found = self._generator.remove([row], return_prompt_caches=True)[row]
        # in arrays of its own: the generator's are for rows that decode
        return self._backend.copy(self._backend.row(found))

    def look(self, row: int) -> Any:
        return self._backend.row(self._generator.extract_cache([row])[row])

    def reset(self) -> None:
        self._in.clear()
        generator, self._generator = self._generator, None
        if generator is not None:
            generator.close()

    close = reset
