"""One decoding step of fixed shapes, captured once in a CUDA graph and replayed for every token.

The host only counts. Whatever changes from step to step lies in a few numbers on the device; the pool, its
table and the rectangles keep their places. A step that does not fit (padding still in the rectangle, layers
of other kinds, no kernels) runs as any forward pass does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.state import State

from .bounded import Bounded, Static
from .cache import BoundedCache, cache_argument
from .kernels.dispatch import enabled
from .modes import ordinary

Step = Callable[[torch.Tensor], torch.Tensor]


def decoder_step(model: PreTrainedModel, cache: BoundedCache) -> Step:
    """A function from tokens (R, 1) to logits (R, V) of the next ones; one step after the other."""
    given = cache_argument(model, cache)

    def plain(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, **given).logits[:, -1]
        return logits

    shared = cache.shared
    if shared is None or len(cache.competing) < len(cache.layers) or not enabled(shared.padding):
        return plain
    return FixedStep(model, given, shared, plain, capture=True)


class FixedStep:
    """Logits of one token after another by replaying a captured step.

    ``capture`` False runs the same fixed step without a graph.
    """

    def __init__(
        self, model: PreTrainedModel, given: dict[str, Any], shared: Bounded, plain: Step, capture: bool
    ) -> None:
        self._model, self._given, self._shared, self._plain = model, given, shared, plain
        self._capture = capture
        self._places: tuple[int, ...] = ()
        self.captures = 0

    @ordinary
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        shared = self._shared
        shared.settle()
        length = shared.recents[0].length
        room = max(1, shared.config.buffer)
        padded = int(shared.schedule.padding.max()) > shared.seen[0] - length
        # before the first compaction the pool still grows
        if padded or length >= room or shared.pool.capacity < shared.config.budget:
            return self._plain(tokens)
        self._fit(tokens, room)
        self._set(tokens, length)
        if self._capture:
            self._graph.replay()
        else:
            self._run()
        self._advance()
        return self._logits.clone()

    def _fit(self, tokens: torch.Tensor, room: int) -> None:
        """Capture again if anything the step reads or writes has moved."""
        shared, pool = self._shared, self._shared.pool
        for recent in shared.recents:
            width = (shared.rows, shared.shape.kv_heads, 0)
            recent.reserve(
                room,
                pool.keys.new_empty(*width, shared.shape.key_dim),
                pool.values.new_empty(*width, shared.shape.value_dim),
            )
        held = [*pool.arrays(), pool.lookup.table, *(a for r in shared.recents for a in r.storage())]
        places = tuple(array.data_ptr() for array in held)
        if places == self._places:
            return
        self._places, self.captures = places, self.captures + 1
        device, gated = shared.device, shared.config.policy == "learned"
        number = torch.zeros(1, dtype=torch.int32, device=device)
        defer = shared.shape.deferred(shared.config.budget, shared.config.buffer)
        dtype = next(self._model.parameters()).dtype
        inputs = torch.zeros(
            shared.shape.layers, shared.rows, defer, shared.shape.hidden_size, dtype=dtype, device=device
        )
        self._static = Static(number, number.clone(), number.long(), list(inputs) if gated else [])
        self._tokens = torch.zeros_like(tokens)
        self._position = torch.zeros(shared.rows, 1, dtype=torch.int64, device=device)
        self._set(tokens, shared.recents[0].length)
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

    def _set(self, tokens: torch.Tensor, length: int) -> None:
        """Write the step's numbers; none of it waits for the device."""
        self._slot = self._shared.recents[0].waiting
        self._tokens.copy_(tokens)
        self._position.fill_(self._shared.seen[0])
        self._static.length.fill_(length)
        self._static.after.fill_(length + 1)
        self._static.waiting.fill_(self._slot)

    def _run(self) -> None:
        self._shared.static = self._static
        try:
            out = self._model(self._tokens, position_ids=self._position, **self._given)
            self._logits = out.logits[:, -1]
        finally:
            self._shared.static = None

    def _advance(self) -> None:
        """What a plain pass does on the host."""
        shared, static = self._shared, self._static
        recents = [copy.copy(recent) for recent in shared.recents]
        for layer, recent in enumerate(recents):
            recent.advance(
                static.inputs[layer][:, self._slot : self._slot + 1] if static.inputs else self._tokens
            )
        seen = (shared, {"seen": [count + 1 for count in shared.seen]})
        shared.put(State([seen, *zip(shared.recents, map(vars, recents), strict=True)]))
