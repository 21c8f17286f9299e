"""Serving on MLX."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, TextStateMachine, make_text_state_machine

from ..core.snapshot import Snapshot
from ..core.types import Array
from ..mlx_backend import hooks, snapshots
from ..mlx_backend.attaching import make_cache
from ..mlx_backend.cache import BoundedCache
from ..mlx_backend.generation import vocabulary
from ..mlx_backend.memory import free_bytes
from ..mlx_backend.sampling import alone
from .channels import Calls, Plain, Said, Splitter
from .drawing import Drawer, Drawing


class OnMLX:
    """As :class:`.backend.Backend`."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        self.model, self._options = model, options
        first = make_cache(model, **options)
        made = hooks.attachment(model)
        assert made is not None and first.shared is not None
        self.shape, self.eviction = made.layout.shape, first.shared.config
        self.identity = first.identity
        self.vocabulary = vocabulary(model)
        # whether all layers' entries can stand in a batch
        self.batches = all(hasattr(entry, "merge") for entry in first)
        self.ends = frozenset(int(token) for token in tokenizer.eos_token_ids)

    def new_cache(self, budget: int | None) -> BoundedCache:
        own = {} if budget is None else {"budget": budget}
        return make_cache(self.model, **(self._options | own))

    def copy(self, cache: BoundedCache) -> BoundedCache:
        # in arrays of its own, which go with it
        return copy.deepcopy(cache)

    def read(self, cache: BoundedCache, ids: list[int]) -> None:
        self.model(mx.array([ids]), cache=cache)
        # as mlx-lm does between chunks
        mx.clear_cache()

    def logprobs(self, cache: BoundedCache, token: mx.array) -> mx.array:
        logits = self.model(token[None], cache=cache)[:, -1]
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def chooser(self, asked: Drawing) -> Any:
        if asked.greedy:
            return greedy
        if asked.plain:
            return alone(asked.sampling)
        draw = Drawer(asked)
        return lambda logprobs: self.array(draw(self.host(logprobs[0])))

    def host(self, logprobs: mx.array) -> Array:
        return np.array(logprobs.astype(mx.float32))

    def array(self, token: int) -> mx.array:
        return mx.array([token])

    def generator(self, rows: int) -> BatchGenerator:
        return BatchGenerator(self.model, completion_batch_size=rows, prefill_batch_size=rows)

    def single(self, found: Any) -> BoundedCache:
        return copy.deepcopy(hooks.checked_cache(self.model, found[0]))

    def take(self, cache: BoundedCache) -> Snapshot:
        return snapshots.take(cache, {})

    def reopen(self, snapshot: Snapshot) -> BoundedCache:
        return hooks.reopened_cache(self.model, snapshot)

    def splitter(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> Splitter:
        if not tokenizer.has_thinking and not tools and not tokenizer.response_transitions:
            return Plain()
        return Marked(tokenizer, ids, tools)

    def free_bytes(self) -> int | None:
        return free_bytes()


def greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


class Marked:
    """Thoughts and tool calls by mlx-lm's own state machine and parsers."""

    def __init__(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> None:
        self._state = make_text_state_machine(tokenizer).make_state(_initial(tokenizer, ids))
        self._calls: Calls | None = None
        if tokenizer.has_tool_calling:
            marks = (tokenizer.tool_call_start, tokenizer.tool_call_end or "")
            self._calls = Calls(lambda text: tokenizer.tool_parser(text, tools), marks)

    def add(self, text: str) -> Said:
        self._state, parts = TextStateMachine.split(self._state, text)
        return self._said(parts)

    def end(self) -> Said:
        self._state, text, state = TextStateMachine.flush(self._state)
        said = self._said([(state or "normal", text)])
        if self._calls is not None:
            said.add(self._calls.end())
        return said

    def _said(self, parts: list[tuple[str, str]]) -> Said:
        said = Said()
        for state, text in parts:
            if state == "tool" and self._calls is not None:
                self._calls.add(text)
                continue
            if self._calls is not None:
                said.add(self._calls.end())
            said.add(Said(reasoning=text) if state == "reasoning" else Said(text))
        return said


def _initial(tokenizer: Any, ids: list[int]) -> str:
    """Whether the prompt left a thought open."""
    if tokenizer.response_initial_state:
        return str(tokenizer.response_initial_state)
    opened = tokenizer.has_thinking and tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids)
    return "reasoning" if opened else "normal"
