"""What becomes of a step that fails on one rank: the server goes on where it can, else it ends."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_kvret.errors import ConfigError, KVRetError, RankLost
from mlx_kvret.serving import starting
from mlx_kvret.serving.drawing import Drawing
from mlx_kvret.serving.leading import Leader, follow

from .threads import together


class Cache:
    seen = entries = nbytes = 0

    def settle(self) -> None:
        """Nothing is due."""


class Due(Cache):
    """Has something to carry out, which needs all ranks."""

    def __init__(self, ranks: Any) -> None:
        self._ranks, self._settled = ranks, False

    def settle(self) -> None:
        self._ranks.sum(np.zeros(1, np.int32))
        self._settled = True

    @property
    def entries(self) -> int:  # type: ignore[override]
        assert self._settled
        return 1


class Backend:
    """Counts what is asked of it, and fails where it is told to."""

    batches = False

    def __init__(self, ranks: Any, fails: str = "") -> None:
        self.ranks, self.fails, self.asked = ranks, fails, list[str]()

    def _note(self, what: str) -> None:
        self.asked.append(what)
        if self.fails == what:
            self.fails = ""
            raise MemoryError(what)

    def new_cache(self, budget: Any) -> Cache:
        self._note("new")
        return Cache()

    def copy(self, cache: Cache) -> Cache:
        self._note("copy")
        return Cache()

    def read(self, cache: Cache, ids: list[int]) -> None:
        self._note("read")

    def chooser(self, asked: Any) -> Any:
        return lambda logprobs: int(self.ranks.likeliest(logprobs)[0])

    def decoder(self, cache: Cache) -> Any:
        return lambda token: np.eye(8, dtype=np.float32)[np.atleast_1d(token) + 1]

    def array(self, token: int) -> Any:
        return np.array([token])


@pytest.mark.parametrize("whose", [0, 1])
def test_a_copy_that_fails_on_one_rank_fails_once(whose: int) -> None:
    def work(ranks: Any) -> Any:
        backend = Backend(ranks, "copy" if ranks.rank == whose else "")
        if ranks.rank:
            follow(backend, 4)
            return backend.asked, 0
        leader = Leader(backend, 4)
        cache = leader.new_cache(8)
        with pytest.raises(MemoryError if whose == 0 else KVRetError):
            leader.copy(cache)
        twin = leader.copy(cache)
        leader.read(twin, [1, 2, 3])
        del cache, twin
        gc.collect()  # an exception's frames are a circle
        # what nobody holds any more goes with the next word
        leader.beat()
        leader.close()
        return backend.asked, len(leader.deeds.caches)

    (first, left), (second, _) = together(2, work)
    assert first == second == ["new", "copy", "copy", "read"]
    assert left == 0


def test_a_row_that_leaves_alone_is_settled_by_all() -> None:
    """Rows one by one: what is due is carried out before the first rank looks at it."""

    def work(ranks: Any) -> Any:
        backend = Backend(ranks)
        backend.new_cache = lambda budget: Due(ranks)  # type: ignore[method-assign]
        if ranks.rank:
            return follow(backend, 4)
        leader = Leader(backend, 4)
        cache = leader.new_cache(8)
        row = leader.join(cache, 3, Drawing())
        tokens = [step.token for _ in range(2) for step in leader.step()]
        left = leader.leave(row)
        leader.close()
        return tokens, left.entries

    assert together(2, work)[0] == ([4, 5], 1)


def test_a_pass_that_fails_on_one_rank_ends_it() -> None:
    """The others cannot be told, for they may be in the midst of it."""

    def work(ranks: Any) -> Any:
        leader = Leader(Backend(ranks, "read"), 4)
        cache = leader.new_cache(None)
        for _ in range(2):
            with pytest.raises(RankLost, match="rank 0 failed"):
                leader.read(cache, [1])
        # nothing is said any more, and nobody waits
        leader.reset()
        leader.close()
        return leader.deeds._backend.asked

    assert together(1, work) == [["new", "read"]]


def test_snapshots_of_a_share_stay_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    share = SimpleNamespace(split=object(), ranks=None)
    monkeypatch.setattr(starting, "backend_for", lambda *_: share)
    with pytest.raises(ConfigError, match="--prompt-cache-dir"):
        starting.serve_along(None, object(), {}, starting.Room(folder=tmp_path))
