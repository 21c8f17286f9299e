"""One decoding step of fixed shapes, recorded once and repeated for every token.

The host only counts. Whatever changes from step to step, the rows' slabs and clocks among it, lies in a few
numbers on the device, which the step itself moves on; the pool, its table and the windows keep their places.
Steps are recorded for 1, 2, 4, ... rows. What does not fit (layers of other kinds, no kernels) runs as any
forward pass does, and so does everything once a recording has failed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.state import State

from . import recording
from .cache import BoundedCache, BoundedKVCache, cache_argument
from .compiling import CompiledCache, compiled, wanted
from .fixed import FixedCache, FixedLayer
from .modes import ordinary
from .reading import Reading
from .recording import Recorder
from .ring import Rings
from .row import Row

T = TypeVar("T")
# rows that a step is recorded for; more decode in plain passes
BUCKETS = (1, 2, 4, 8, 16, 32)


class Step(Protocol):
    """From tokens (R, 1) to ``then`` of the logits (R, V) of what comes next; one step after the other.

    The tokens are in the cache when ``then`` has returned, and not if it raises. The logits are those of this
    step until the next one begins.
    """

    def __call__(self, tokens: torch.Tensor, then: Callable[[torch.Tensor], T]) -> T: ...

    def release(self) -> None:
        """Give back the memory of recorded steps; the next one is recorded anew."""


def decoder_step(model: PreTrainedModel, cache: BoundedCache) -> Step:
    """The fastest step there is for a model and its cache."""
    # sums over ranks are not recorded
    shared = None if cache.share is not None else cache.shared
    made = None if shared is None else recording.recorder(shared.arena.device)
    return PlainStep(model, cache) if made is None else FixedStep(model, cache, made)


class PlainStep:
    """A forward pass as any other."""

    def __init__(self, model: PreTrainedModel, cache: BoundedCache) -> None:
        self._model, self._cache = model, cache
        self._given = cache_argument(model, cache)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, then: Callable[[torch.Tensor], T]) -> T:
        def forward() -> T:
            return then(self._model(tokens, **self._given).logits[:, -1])

        done: T = self._cache.run(forward)
        return done

    def release(self) -> None:
        """There is none."""


class FixedStep:
    """A recorded step, or a plain one where none fits; ``captures`` counts recordings.

    Args:
        make: a recorder for each number of rows.
    """

    def __init__(self, model: PreTrainedModel, cache: BoundedCache, make: Callable[[], Recorder]) -> None:
        self._model, self._cache, self._make = model, cache, make
        self._plain = PlainStep(model, cache)
        self._bodies: dict[int, Body] = {}
        self._held: list[Any] = []
        self._rings = Rings([])
        self._compile = wanted(model)
        self.failed = False
        self.captures = 0

    @ordinary
    def __call__(self, tokens: torch.Tensor, then: Callable[[torch.Tensor], T]) -> T:
        shared = self._cache.shared
        assert shared is not None
        shared.settle()
        if not self.failed and self._fits(shared.rows, tokens):
            try:
                body = self._ready(shared.rows)
                body.repeat(shared.rows, tokens)
            except Exception as error:
                self._give_up(error)
            else:
                done = then(body.logits[: len(tokens)])
                self._advance(shared.rows)
                return done
        return self._plain(tokens, then)

    def _fits(self, rows: list[Row], tokens: torch.Tensor) -> bool:
        if not 0 < len(rows) == len(tokens) <= BUCKETS[-1] or tokens.shape[1] != 1:
            return False
        shared = self._cache.shared
        assert shared is not None
        limit = shared.arena.limit
        if any(row.chunk is not None or row.length >= limit or not row.seen for row in rows):
            return False
        stock = self._cache.stock
        return not stock or self._cache.rings is not None or (not any(shared.padding) and Rings.fit(stock))

    def _ready(self, rows: list[Row]) -> Body:
        """The step for so many rows, recorded again if anything it reads or writes has moved."""
        shared, stock = self._cache.shared, self._cache.stock
        assert shared is not None
        for row in rows:
            row.own()
        if not _same(self._held, self._places()):
            self._bodies.clear()
            _make_room(self._model, rows)
            self._held = self._places()
        if stock and self._cache.rings is None:
            if not self._rings.serve(stock):
                self._bodies.clear()
                self._rings = Rings(stock)
            self._rings.load(shared.places)
            self._cache.rings = self._rings
            self._rings.replace()
        # rows of sliding windows stand in rings side by side; of all others the last one fills the bucket
        size = len(rows) if stock else next(n for n in BUCKETS if n >= len(rows))
        if (body := self._bodies.get(size)) is None:
            body = self._recorded([*rows, *rows[-1:] * (size - len(rows))])
            self._bodies[size] = body
            self.captures += 1
        return body

    def _recorded(self, rows: list[Row]) -> Body:
        """A new recording, of compiled layers where that is wanted and works."""
        if self._compile:
            try:
                return Body(self._model, self._cache, rows, self._rings, self._make(), compile=True)
            except Exception as error:
                self._compile = False
                _warn("steps are not compiled, because compiling", error)
        return Body(self._model, self._cache, rows, self._rings, self._make())

    def _places(self) -> list[Any]:
        """Everything that a recorded step has the address of, and the settings that it was made for."""
        shared = self._cache.shared
        assert shared is not None
        arena = shared.arena
        return [arena.config, *arena.pool.arrays(), *arena.recent.arrays()]

    def _advance(self, rows: list[Row]) -> None:
        """What a plain pass does on the host."""
        shared = self._cache.shared
        assert shared is not None
        after: list[tuple[Any, dict[str, Any]]] = [
            (row, {"seen": row.seen + 1, "length": row.length + 1}) for row in rows
        ]
        after.append((shared, {"places": shared.places + 1}))
        shared.arena.put(State(after))

    def release(self) -> None:
        self._bodies.clear()
        self._held = []

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        self.release()
        _warn("decoding goes on in plain passes, which are slower, because recording a step", error)


class Body:
    """The fixed memory of a step of R ``rows``, recorded, and the recorder that repeats it."""

    def __init__(
        self, model: PreTrainedModel, cache: BoundedCache, rows: list[Row], rings: Rings, recorder: Recorder,
        compile: bool = False,
    ) -> None:  # fmt: skip
        reading = Reading.fixed(rows[0].arena, rows)
        assert reading.places is not None
        self._model, self._recorder, self._places = model, recorder, reading.places
        self._compile = compile
        self._gated = reading.arena.gates is not None
        windows = iter(rings.layers)
        layers = [
            FixedLayer(reading, layer.layer) if isinstance(layer, BoundedKVCache) else next(windows)
            for layer in cache.layers
        ]
        self._cache = CompiledCache(reading, layers) if compile else FixedCache(reading, layers)
        self._given = cache_argument(model, self._cache)
        self._tokens = torch.zeros(len(self._places.seen), 1, dtype=torch.long, device=reading.arena.device)
        self.logits: torch.Tensor
        # what the numbers on the device are, of each row
        self._known: list[tuple[int, ...]] | None = None
        recorder.record(self._work, lambda: self._places.set(Reading.numbers(rows)))

    def repeat(self, rows: list[Row], tokens: torch.Tensor) -> None:
        """Repeat the step for these rows, of which there may be fewer."""
        now = [(row.hold.index, row.length, row.waiting, row.seen, row.next) for row in rows]
        extra = len(self._tokens) - len(rows)
        if now != self._known:
            self._places.set(Reading.numbers([*rows, *rows[-1:] * extra]))
        self._tokens[: len(rows)].copy_(tokens)
        if extra:
            self._tokens[len(rows) :].copy_(tokens[-1:].expand(extra, 1))
        self._known = None
        self._recorder.repeat(self._work)
        waits = int(self._gated)
        self._known = [(at, n + 1, wait + waits, seen + 1, place + 1) for at, n, wait, seen, place in now]

    def _work(self) -> None:
        """What is recorded: the model's own pass, and then the numbers of the next step."""

        def forward() -> torch.Tensor:
            out = self._model(self._tokens, position_ids=self._places.next[:, None], **self._given)
            logits: torch.Tensor = out.logits[:, -1]
            return logits

        with compiled(self._model) if self._compile and not recording.watched() else nullcontext():
            self.logits = self._cache.run(forward)
        self._places.move_on()


def _make_room(model: PreTrainedModel, rows: list[Row]) -> None:
    """The pool at its full size, and windows for all that comes before a compaction."""
    arena, row = rows[0].arena, rows[0]
    recent, pool, limit = arena.recent, arena.pool, arena.limit
    held = next((own for own in rows if own.length), None)
    if held is not None:
        keys, values = held.newest(0, 0, 1)
    else:
        keys, values = (a[None, None] for a in pool.like)
    full = max(own.schedule.most for own in rows)
    if pool.capacity < full:
        pool.grow(full, keys, values)
    recent.reserve(limit, limit, keys, values)
    if arena.gates is not None:
        recent.reserve_inputs(next(model.parameters()).dtype)
        recent.reserve_scores(limit, limit)
    assert row.chunk is None


def _warn(what: str, error: Exception) -> None:
    first, second, *_ = [*str(error).split("\n"), ""]
    reason = f"{first} {second}" if first.endswith(":") else first
    warnings.warn(f"{what} failed: {type(error).__name__}: {reason}", stacklevel=4)


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
