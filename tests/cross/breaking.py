"""Breaking passes off: exceptions at chosen places of the code that changes a cache, on both backends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

from mlx_kvret.cuda_backend import arena as torch_arena
from mlx_kvret.cuda_backend import bounded as torch_bounded
from mlx_kvret.cuda_backend import compaction as torch_compaction
from mlx_kvret.cuda_backend import layer as torch_layer
from mlx_kvret.cuda_backend import pool as torch_pool
from mlx_kvret.cuda_backend import reading as torch_reading
from mlx_kvret.cuda_backend import recent as torch_recent
from mlx_kvret.cuda_backend import row as torch_row
from mlx_kvret.mlx_backend import arena as mlx_arena
from mlx_kvret.mlx_backend import bounded as mlx_bounded
from mlx_kvret.mlx_backend import compaction as mlx_compaction
from mlx_kvret.mlx_backend import entry as mlx_entry
from mlx_kvret.mlx_backend import pool as mlx_pool
from mlx_kvret.mlx_backend import reading as mlx_reading
from mlx_kvret.mlx_backend import recent as mlx_recent
from mlx_kvret.mlx_backend import row as mlx_row

from .sides import Side

KINDS: tuple[type[BaseException], ...] = (KeyboardInterrupt, RuntimeError, MemoryError)
_PLACES: dict[str, list[tuple[Any, str]]] = {
    "mlx": [
        *((mlx_reading.Reading, name) for name in ("observe", "append", "view", "after", "before")),
        *((mlx_recent.Recent, name) for name in ("append", "put", "window")),
        *((mlx_pool.Pool, name) for name in ("grow", "destinations", "admit", "fill")),
        *((mlx_entry.BoundedKVCache, name) for name in ("observe", "update_and_fetch", "attend")),
        (mlx_entry.BoundedKVCache, "make_mask"),
        *((mlx_bounded.Bounded, name) for name in ("settle", "prepare", "begin", "finish")),
        *((mlx_arena.Arena, name) for name in ("put", "score", "gate", "tidy")),
        (mlx_row.Row, "window"),
        *((mlx_compaction, name) for name in ("select_rows", "candidates")),
        *((mlx_bounded, name) for name in ("compacted", "folded")),
        (mlx_reading, "attend"),
    ],
    "torch": [
        *((torch_reading.Reading, name) for name in ("observe", "append", "views", "commit")),
        *((torch_recent.Recent, name) for name in ("reserve", "reserve_scores", "reserve_inputs")),
        *((torch_pool.Pool, name) for name in ("destinations", "admitted", "fill", "take")),
        (torch_arena.Arena, "put"),
        (torch_bounded, "run_gates"),
        *((torch_row.Row, name) for name in ("own", "retention", "newest", "scores")),
        (torch_pool.Pool, "grow"),
        *((torch_layer.BoundedKVCache, name) for name in ("observe", "update", "attend")),
        *((torch_bounded.Bounded, name) for name in ("settle", "begin", "before", "commit")),
        (torch_compaction, "select"),
        (torch_compaction, "fill"),
        (torch_layer, "attend"),
    ],
}  # fmt: skip
FILES = tuple(
    str(Path(module.__file__ or "").parent / name)
    for module, names in {
        mlx_bounded: (
            *("arena", "bounded", "cache", "compaction", "forward", "hooks", "lookup", "observed", "pool"),
            *("entry", "joining", "reading", "recent", "row"),
        ),
        torch_bounded: (
            "arena",
            "bounded",
            "cache",
            "compaction",
            "forward",
            "hooks",
            "layer",
            "pool",
            "reading",
            "recent",
            "row",
        ),
    }.items()
    for name in (f"{name}.py" for name in names)
)


class Count:
    """Raises ``kind`` at the ``at``-th of the places that are passed; None only counts."""

    def __init__(self, at: int | None = None, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.kind, self.passed = at, kind, 0

    def __call__(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            raise self.kind("made up")


@contextlib.contextmanager
def at_calls(side: Side, count: Count) -> Iterator[None]:
    """Pass a place before and after each call of what changes a cache, and of each layer's MLP."""
    model: Any = side.model
    mlps = [(type(model.model.layers[0].mlp), "__call__" if side.backend == "mlx" else "forward")]
    with contextlib.ExitStack() as stack:
        for owner, name in [*_PLACES[side.backend], *mlps]:
            stack.enter_context(_replaced(owner, name, count))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, count: Count) -> Iterator[None]:
    stock: Callable[..., Any] = getattr(owner, name)

    @wraps(stock)
    def broken(*args: Any, **kwargs: Any) -> Any:
        count()
        out = stock(*args, **kwargs)
        count()
        return out

    setattr(owner, name, broken)
    try:
        yield
    finally:
        setattr(owner, name, stock)


@contextlib.contextmanager
def at_lines(count: Count) -> Iterator[None]:
    """Pass a place before each line of our own that is run: an interrupt may come at any of them."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            count()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def attempt(place: Callable[[], contextlib.AbstractContextManager[None]], act: Callable[[], Any]) -> bool:
    """Whether ``act`` was broken off by a made-up exception."""
    try:
        with place():
            act()
    except KINDS as error:
        if "made up" not in str(error):
            raise
        return True
    return False
