"""Tables of the torch backend: bandwidth of one layer, whole steps, first token. Each row is told at once.

Captured is compared with captured and eager with eager; compilation comes before anything is timed; a case
is freed before the next is made. Used by cuda_decode.py and gpu_check.py.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_cases import (
    Step,
    bounded,
    bounded_step,
    build,
    captured_step,
    free,
    full_cache,
    peers,
    plain_step,
    ragged_view,
    read,
    recorded,
    shares,
    stock,
)  # fmt: skip
from gpu_timing import DEVICE, DTYPE, GPU, copy_bandwidth, fresh_peak, peak_bytes, per_call, per_token
from gpu_timing import ROTATED as ROTATED_BYTES
from torch.nn import functional as F
from transformers import DynamicCache

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.cuda_backend.compiling import want
from mlx_kvret.cuda_backend.kernels.dispatch import attend

Put = Callable[..., None]
Left = Callable[[], float]


@dataclass
class Plan:
    """What a table of whole steps measures."""

    size: str
    batches: tuple[int, ...] = (1, 4, 16) if GPU else (1, 2)
    context: int = 32768 if GPU else 96
    budget: int = 1024 if GPU else 16
    chunk: int = 2048 if GPU else 32
    tokens: int = 32 if GPU else 2
    turns: int = 5 if GPU else 1
    # contexts of the first token
    contexts: tuple[int, ...] = (32768, 131072) if GPU else (64, 128)

    @classmethod
    def of(cls, size: str, **more: Any) -> Plan:
        """The plan for a size, tiny without a GPU."""
        return dataclasses.replace(cls(size if GPU else "tiny"), **more)


# ---------------------------------------------------------------- one layer


def bandwidth_rows(put: Put, left: Left) -> None:
    """Decode attention of the shapes of Qwen3: bytes that must be read, over time, over copy bandwidth."""
    heads, group, dim = (8, 4, 128) if GPU else (2, 2, 16)
    limit = copy_bandwidth()
    put("copy", gb_per_s=limit / 1e9)
    cases = [(1, 8192), (1, 32768), (1, 1024), (4, 1024), (16, 1024)] if GPU else [(1, 32), (2, 32)]
    for rows, kept in cases:
        once = 2 * rows * heads * (kept + 1) * dim * DTYPE.itemsize
        queries = torch.randn(rows, heads * group, 1, dim, device=DEVICE, dtype=DTYPE)
        copies, even = max(1, min(24, ROTATED_BYTES // once)), 0.0
        for name, lengths in shares(kept, heads).items():
            if left() < 8:
                return
            views = [ragged_view(lengths, 1, dim, rows, seed) for seed in range(copies)]
            time = per_call([partial(attend, queries, view, dim**-0.5) for view in views])
            even = even or time
            put(f"{name}, {rows} rows, {kept} per head", us=time * 1e6, gb_per_s=once / time / 1e9,
                of_copy=once / time / limit, time_over_balanced=time / even)  # fmt: skip
            del views
            free()
        dense = [
            torch.randn(2, rows, heads, kept + 1, dim, device=DEVICE, dtype=DTYPE) for _ in range(copies)
        ]
        own = partial(F.scaled_dot_product_attention, enable_gqa=True)
        time = per_call([partial(own, queries, *pair) for pair in dense])
        put(f"torch's SDPA, dense, {rows} rows, {kept} per head", us=time * 1e6, of_copy=once / time / limit)
        flashinfer_row(put, queries, dense, once, limit)
        del dense
        free()


def flashinfer_row(
    put: Put, queries: torch.Tensor, dense: list[torch.Tensor], once: int, limit: float
) -> None:
    """FlashInfer's decoding of one row, where it can be imported."""
    try:
        from flashinfer import single_decode_with_kv_cache
    except ImportError:
        return
    if len(queries) == 1:
        calls = [
            partial(single_decode_with_kv_cache, queries[0, :, 0], k[0], v[0], kv_layout="HND")
            for k, v in dense
        ]
        time = per_call(calls)
        put(
            f"FlashInfer, dense, {dense[0].shape[3] - 1} per head", us=time * 1e6, of_copy=once / time / limit
        )


# ---------------------------------------------------------------- whole steps


def decode_rows(put: Put, left: Left, plan: Plan, made: tuple[Any, hooks.Attachment] | None = None) -> None:
    """Milliseconds and tokens per second of bounded and full caches, batch by batch."""
    model, attachment = made or build(plan.size)
    config = EvictionConfig.create(plan.budget)
    formula = attachment.layout.shape.nbytes(config.budget, config.buffer)
    for rows in plan.batches:
        known: dict[str, float] = {}
        for name, eager in (("bounded, captured", False), ("bounded, eager", True)):
            if left() < 12:
                return
            with _case(put, name, rows):
                fresh_peak()
                # after more than the budget a longer context changes nothing
                cache = bounded(model, attachment, config, rows, 4 * plan.budget, plan.chunk)
                step = bounded_step(model, cache, eager)
                known[name] = _row(put, name, rows, step, plan, eager, cache_mb=cache.nbytes / 1e6,
                                   formula_mb=formula * rows / 1e6)  # fmt: skip
                del cache, step
            free()
        for name, (attention, kind, capture) in peers().items():
            if left() < 12:
                return
            with _case(put, name, rows), stock(model, attention):
                fresh_peak()
                full = full_cache(model, kind, rows, plan.context, plan.tokens * (plan.turns + 3))
                held = sum(a.nbytes for layer in full.layers for a in (layer.keys, layer.values)) / 1e6
                step = captured_step(model, full, rows, plan.context) if capture else plain_step(model, full)
                known[name] = _row(put, name, rows, step, plan, not capture, cache_mb=held)
                del full, step
            free()
        ours, ideal = known.get("bounded, captured"), known.get("full, in place (ideal), captured")
        if ours and ideal:
            put("captured: full over bounded", rows=rows, times=ideal / ours)
        ours, theirs = known.get("bounded, eager"), known.get("full, DynamicCache, eager")
        if ours and theirs:
            put("eager: full over bounded", rows=rows, times=theirs / ours)
    overhead_row(put, model, attachment, config, plan)
    if GPU and left() > 45:
        # the last, for compiling takes long
        want(model, DEVICE)
        with _case(put, "bounded, captured, compiled", 1):
            fresh_peak()
            cache = bounded(model, attachment, config, 1, 4 * plan.budget, plan.chunk)
            _row(put, "bounded, captured, compiled", 1, bounded_step(model, cache, False), plan, False)


def _row(
    put: Put,
    name: str,
    rows: int,
    step: Step,
    plan: Plan,
    eager: bool,
    **figures: float,
) -> float:
    tokens = max(2, plan.tokens // 2) if eager else plan.tokens
    seconds = statistics.median(per_token(step, rows, tokens, plan.turns))
    peak = peak_bytes()
    put(name, rows=rows, ms=seconds * 1e3, tokens_per_s=rows / seconds,
        **figures,
        peak_gb="not counted" if peak is None else peak / 1e9)  # fmt: skip
    return seconds


class _case:
    """A case that fails becomes a line, and its memory is free for the next one."""

    def __init__(self, put: Put, name: str, rows: int) -> None:
        self._put, self._name, self._rows = put, name, rows

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception) or "illegal memory" in str(error):
            return False
        wrong = {} if isinstance(error, torch.OutOfMemoryError) else {"ok": False}
        self._put(self._name, rows=self._rows, error=f"{kind.__name__}: {str(error)[:300]}", **wrong)
        return True


def overhead_row(put: Put, model: Any, made: hooks.Attachment, config: EvictionConfig, plan: Plan) -> None:
    """The share of compactions and gates: turns of two buffers of tokens, and with none of them due."""
    spent = []
    for counted in (True, False):
        cache = bounded(model, made, config, 1, 4 * plan.budget, plan.chunk)
        assert cache.shared is not None
        cache.shared.settle()
        step = recorded(model, cache)
        own: Step = lambda tokens, step=step: step(tokens, torch.clone)  # noqa: E731
        if not counted:
            _pause(cache.shared, own)
        spent.append(statistics.median(per_token(own, 1, 2 * config.buffer, 3 if GPU else 1)))
        del cache, step, own
        free()
    put("compactions and gates", share=1 - spent[1] / spent[0], ms=spent[0] * 1e3, ms_without=spent[1] * 1e3)


def _pause(shared: Any, step: Step) -> None:
    """Have the clocks of the rows stand still, so that the same step is repeated and nothing is ever due."""
    advance = shared.arena.put

    def put(change: Any) -> None:
        if type(change).__name__ != "State":
            advance(change)

    shared.arena.put = put


# ---------------------------------------------------------------- the first token


def first_token_rows(
    put: Put, left: Left, plan: Plan, given: tuple[Any, hooks.Attachment] | None = None
) -> None:
    """Seconds until the first token of long prompts, and peak memory against what arithmetic says."""
    model, made = given or build(plan.size)
    config, shape = EvictionConfig.create(plan.budget), made.layout.shape
    weights = sum(weight.nbytes for weight in model.parameters())
    weights += sum(weight.nbytes for weight in made.gates.parameters()) if made.gates is not None else 0
    for context in plan.contexts:
        ids = torch.randint(0, model.config.vocab_size, (1, context), device=DEVICE)
        known: dict[str, float] = {}
        for name in ("bounded", "full"):
            if left() < 10:
                return
            with _case(put, f"{name}, {context} tokens", 1):
                # compiled before it is timed
                _prompt(model, made, config, ids[:, : 2 * plan.chunk + 2 * plan.budget], plan.chunk, name)
                free()
                fresh_peak()
                known[name] = _prompt(model, made, config, ids, plan.chunk, name)
                peak = peak_bytes()
                cached = (
                    shape.nbytes(config.budget, config.buffer) + shape.full_nbytes(plan.chunk)
                    if name == "bounded"
                    else shape.full_nbytes(context)
                )
                put(f"{name}, {context} tokens", s=known[name], tokens_per_s=context / known[name],
                    peak_gb="not counted" if peak is None else peak / 1e9,
                    weights_gb=weights / 1e9, cache_by_formula_gb=cached / 1e9)  # fmt: skip
            free()
        if len(known) == 2:
            put(f"first token at {context}: full over bounded", times=known["full"] / known["bounded"])


def _prompt(
    model: Any, made: hooks.Attachment, config: Any, ids: torch.Tensor, chunk: int, name: str
) -> float:
    """Seconds of reading in chunks: into a bounded cache, or a full one with the model's own attention."""
    if name == "bounded":
        return read(model, hooks.new_cache(model, made, config), ids, chunk)
    with stock(model):
        return read(model, DynamicCache(config=model.config), ids, chunk)
