"""One decoding step of fixed shapes, captured once in a CUDA graph and replayed for every token.

The host only counts. Whatever changes from step to step, the clocks of the rows among it, lies in a few
numbers on the device; the pool, its table and the windows keep their places. A step that does not fit (a
pool that still grows, layers of other kinds, no kernels) runs as any forward pass does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.state import State

from .bounded import Bounded
from .cache import BoundedCache, cache_argument
from .kernels.dispatch import enabled
from .modes import ordinary
from .reading import Reading

Step = Callable[[torch.Tensor], torch.Tensor]


def decoder_step(model: PreTrainedModel, cache: BoundedCache) -> Step:
    """A function from tokens (R, 1) to logits (R, V) of the next ones; one step after the other."""
    given = cache_argument(model, cache)

    def plain(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, **given).logits[:, -1]
        return logits

    shared = cache.shared
    if shared is None or len(cache.competing) < len(cache.layers) or not enabled(shared.arena.device):
        return plain
    return FixedStep(model, given, shared, plain, capture=True)


class FixedStep:
    """Logits of one token after another by replaying a captured step, for as many rows as the cache has.

    ``capture`` False runs the same fixed step without a graph.
    """

    def __init__(
        self, model: PreTrainedModel, given: dict[str, Any], shared: Bounded, plain: Step, capture: bool
    ) -> None:
        self._model, self._given, self._shared, self._plain = model, given, shared, plain
        self._capture = capture
        self._static: Reading
        self._tokens: torch.Tensor
        self._places: tuple[int, ...] = ()
        self.captures = 0

    @ordinary
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        shared = self._shared
        shared.settle()
        rows, arena = shared.rows, shared.arena
        for row in rows:
            row.own()
        # before the first compaction the pool still grows
        growing = arena.pool.capacity < max(row.config.budget for row in rows)
        if growing or any(row.length >= arena.limit for row in rows) or len(rows) != len(tokens):
            return self._plain(tokens)
        self._fit(tokens)
        if self._capture:
            self._graph.replay()
        else:
            self._run()
        self._advance()
        return self._logits.clone()

    def _fit(self, tokens: torch.Tensor) -> None:
        """Write the step's numbers, and capture again if anything it reads or writes has moved."""
        shared, arena = self._shared, self._shared.arena
        width, pool, limit = (1, arena.shape.kv_heads, 0), arena.pool, arena.limit
        arena.recent.reserve(
            limit,
            limit,
            pool.keys.new_empty(*width, arena.shape.key_dim),
            pool.values.new_empty(*width, arena.shape.value_dim),
        )
        if arena.gates is not None:
            arena.recent.reserve_inputs(next(self._model.parameters()).dtype)
            arena.recent.reserve_scores(limit, limit)
        held = (*pool.arrays(), *arena.recent.arrays())
        places = (len(tokens), *(array.data_ptr() for array in held))
        if places == self._places:
            assert self._static.places is not None
            self._static.places.set(Reading.numbers(shared.rows))
            self._tokens.copy_(tokens)
            return
        self._static = Reading.fixed(arena, shared.rows)
        self._places, self.captures = places, self.captures + 1
        self._tokens = tokens.clone()
        if self._capture:
            # a first run on another stream, for what libraries allocate once; the replay writes the same
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()

    def _run(self) -> None:
        self._shared.static = static = self._static
        assert static.places is not None
        try:
            out = self._model(self._tokens, position_ids=static.places.seen[:, None], **self._given)
            self._logits = out.logits[:, -1]
        finally:
            self._shared.static = None

    def _advance(self) -> None:
        """What a plain pass does on the host."""
        shared = self._shared
        after = ((row, {"seen": row.seen + 1, "length": row.length + 1}) for row in shared.rows)
        shared.arena.put(State([*after, (shared, {"places": shared.places + 1})]))
