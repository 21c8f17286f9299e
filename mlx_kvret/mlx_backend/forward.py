"""One forward pass of a bounded model: it is begun, and then part of the cache or undone.

MLX computes late. What it fails at is garbage from then on, and it says so once, to whoever evaluates next,
who may be somebody else. So a pass is computed before it counts, while what was there before is still held. A
pass of a few tokens writes where the old values stand, or it would cost a copy of them, and cannot be undone
once it is being computed; single tokens in mlx-lm's loop are left in flight, for that loop runs ahead of the
device. A cache that MLX fails at in these cases is lost, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream

from ..core.chunks import does_not_fit, largest_chunk
from ..core.passes import Passes
from ..core.state import State
from ..core.watch import watched
from ..errors import CacheError, KVRetError
from .bounded import Bounded
from .entry import BoundedKVCache, running
from .ranks import drain
from .reading import FEW
from .vision import logits_of

# logits of so many bytes are computed with the pass; those of a prompt's chunk nobody may ever look at
SMALL = 1 << 24

Forward = Callable[[int], Any]


def run(
    cache: list[Any], tokens: int, forward: Forward, sliced: bool, noted: tuple[State, State] | None = None
) -> Any:
    """What ``forward(tokens)`` returns, which reads as many tokens into the entries of ``cache``.

    After any exception the cache is as it was, or refuses to go on. ``sliced`` says whether ``forward`` can
    be asked for fewer tokens, as is tried to find out how many fit. ``noted`` is what else becomes of the
    cache, before and after.

    Raises:
        OutOfMemoryError: names a number of tokens that fits.
        CacheError: the cache cannot go on.
    """
    parts = leaves(cache)
    shared = next((part.shared for part in parts if isinstance(part, BoundedKVCache)), None)
    whole: Any = cache if shared is None else shared
    passes: Passes = whole.passes
    passes.check()
    one = _Pass(parts, shared, passes, _runs_ahead(), *(noted or (State([]), State([]))))
    together = shared is not None and shared.arena.share is not None
    try:
        with watched("a forward pass", together):
            if together and not one.ahead:
                drain()
            one.prepare(tokens)
            return one.run(tokens, forward)
    except (RuntimeError, MemoryError) as error:
        if tokens <= FEW or not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # outside of the handler, whose traceback would keep the arrays of the pass
    mx.clear_cache()
    seen = int(whole.seen) if shared is None else max(row.seen for row in shared.rows)
    chunk = largest_chunk(tokens, lambda size: one.fits(size, forward)) if sliced else None
    raise does_not_fit(tokens, seen, reason, chunk, "read fewer at a time, or lower the budget")


@dataclass
class _Pass:
    """``parts`` are the entries of all layers, ``shared`` what the bounded ones among them share."""

    parts: list[Any]
    shared: Bounded | None
    passes: Passes
    ahead: bool
    was: State
    becomes: State

    def prepare(self, tokens: int) -> None:
        """Have everything decided and, unless the loop runs ahead, computed that a pass builds upon."""
        wait = not (self.ahead and tokens == 1)
        if wait:
            confirm(self.parts, self.shared, self.passes)
        if self.shared is not None:
            self.shared.prepare(tokens, wait)

    def run(self, tokens: int, forward: Forward, trial: bool = False) -> Any:
        """The pass; a ``trial`` is undone in the end."""
        shared, passes = self.shared, self.passes
        outer = running.set(shared)
        try:
            reading, before = (None, None) if shared is None else shared.begin(tokens)
            passes.begin(self._before(before))
            if shared is not None:
                shared.reading = reading
            out = forward(tokens)
            if shared is not None:
                shared.finish()
            self.becomes.put()
            if tokens > FEW:
                mx.eval(self._arrays(), [] if self.ahead else _small(out))
            if trial:
                raise _Undone
            # from here to the commit whatever breaks this off leaves it to be undone
            passes.running = False
        except BaseException as error:
            passes.running = False
            passes.undo()
            doubt(passes, error)
            raise
        finally:
            running.reset(outer)
        passes.commit()
        if tokens <= FEW:
            self._compute(tokens, out)
        return out

    def fits(self, tokens: int, forward: Forward) -> bool:
        """Whether so many tokens could be read."""
        try:
            self.run(tokens, forward, trial=True)
        except _Undone:
            return True
        except (RuntimeError, MemoryError):
            mx.clear_cache()
        return False

    def _before(self, shared: State | None) -> State:
        held = State(
            (part, {name: _held(value) for name, value in vars(part).items()})
            for part in self.parts
            if not isinstance(part, BoundedKVCache)
        )
        return State.all([held, self.was] if shared is None else [shared, held, self.was])

    def _compute(self, tokens: int, out: Any) -> None:
        """A few tokens, which are part of the cache already."""
        if self.ahead and tokens == 1:
            self.passes.in_flight = True
            return
        try:
            mx.eval(self._arrays(), _small(out))
        except Exception as error:
            lose(self.passes, error)
            raise

    def _arrays(self) -> list[Any]:
        return [[] if self.shared is None else self.shared.arena.newest(), _others(self.parts)]


class _Undone(Exception):
    """The end of a trial."""


def lose(passes: Passes, error: BaseException) -> None:
    """Note that MLX failed at what a cache holds."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    passes.lose(f"MLX failed while it computed what the cache holds ({reason})")


def doubt(passes: Passes, error: BaseException) -> None:
    """What MLX fails at may be what an earlier pass has left in flight."""
    ours = isinstance(error, KVRetError) or not isinstance(error, (RuntimeError, MemoryError))
    if passes.in_flight and not ours:
        lose(passes, error)


def confirm(parts: list[Any], shared: Bounded | None, passes: Passes) -> None:
    """Wait for what is in flight of all of a cache's entries.

    Raises:
        CacheError: it failed, so that the cache cannot go on.
    """
    if not passes.in_flight:
        return
    try:
        mx.eval([] if shared is None else shared.arrays(), _others(parts))
    except Exception as error:
        lose(passes, error)
        raise CacheError(passes.lost) from error
    passes.in_flight = False


def leaves(cache: list[Any]) -> list[Any]:
    """The entries of a prompt cache, those of nested lists one by one."""
    return [part for entry in cache for part in getattr(entry, "caches", (entry,))]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of MLX says that there is no memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "memory" in text or "alloc" in text or "resource limit" in text


def _runs_ahead() -> bool:
    """Whether the caller is a loop of mlx-lm, which runs on a stream of its own."""
    device = mx.default_device()
    found = mx.default_stream(device)
    with mx.stream(generation_stream):
        return bool(mx.default_stream(device) == found)


def _held(value: Any) -> Any:
    """A value of a stock entry, which changes its arrays and lists in place."""
    if isinstance(value, mx.array):
        return value[...]  # an array of its own on the same values
    return [_held(one) for one in value] if isinstance(value, list) else value


def _others(parts: list[Any]) -> list[Any]:
    """What entries hold that do not compete."""
    return [list(vars(part).values()) for part in parts if not isinstance(part, BoundedKVCache)]


def _small(out: Any) -> list[mx.array]:
    flat: Any = tree_flatten(logits_of(out))
    arrays = [value for _, value in flat if isinstance(value, mx.array)]
    return arrays if sum(array.nbytes for array in arrays) <= SMALL else []
