"""A forward pass that is broken off, wherever that is, changes nothing, or the cache refuses to go on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache as once
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvret
from mlx_kvret.errors import CacheError
from mlx_kvret.mlx_backend.forward import FEW

from .breaking import KINDS, Count, at_calls, at_lines, attempt
from .sides import BACKENDS, Side, ids, kept

TEXT = ids(80)
# a chunk that is due for a compaction before it is read, and one decoded token that is
SIZES = {"prefill": 12, "decoding": 1}
side_of = once(Side.of)


@once
def ready(backend: str, family: str, size: int) -> tuple[Any, Any, np.ndarray]:
    """A cache before a pass of so many tokens, the cache after it and one more, and the logits of that."""
    side = side_of(backend, family)
    before = side.cache(budget=9, buffer=3)
    for start in range(0, 24, 8):
        side.read(before, TEXT[start : start + 8])
    (row,) = before.shared.rows
    while row.schedule.next(row.seen, row.length) is None:
        side.read(before, TEXT[before.seen : before.seen + 1])
    after = unsettled(side, before)
    side.read(after, TEXT[after.seen : after.seen + size])
    return before, after, side.read(after, TEXT[after.seen : after.seen + 5])


def unsettled(side: Side, cache: Any) -> Any:
    """A copy in which the last token's compaction is still to come."""
    twin = side.cache(budget=9, buffer=3)
    for start in range(0, 24, 8):
        side.read(twin, TEXT[start : start + 8])
    while twin.seen < cache.seen:
        side.read(twin, TEXT[twin.seen : twin.seen + 1])
    return twin


def check(backend: str, family: str, size: int, break_off: Callable[[Side, Callable[[], Any]], bool]) -> str:
    """Break one pass off, read it again, and compare with a cache that was never broken off."""
    side, (before, after, expected) = side_of(backend, family), ready(backend, family, size)
    start, cache = before.seen, unsettled(side, before)
    broken = break_off(side, lambda: side.read(cache, TEXT[start : start + size]))
    try:
        assert cache.seen in (start, start + size)
        side.read(cache, TEXT[cache.seen : start + size]) if cache.seen == start else None
        logits = side.read(cache, TEXT[start + size : start + size + 5])
    except CacheError as error:
        assert "new cache" in str(error)
        return "lost"
    assert kept(cache) == kept(after)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    return "undone" if broken else "whole"


def places(backend: str, family: str, size: int, way: str) -> int:
    count = Count()
    ready(backend, family, size)
    check(backend, family, size, lambda side, act: attempt(where(side, way, count), act))
    return count.passed


def where(side: Side, way: str, count: Count) -> Callable[[], Any]:
    return lambda: at_calls(side, count) if way == "calls" else at_lines(count)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", SIZES)
def test_an_exception_at_any_call_changes_nothing(backend: str, what: str) -> None:
    total, found = places(backend, "qwen3", SIZES[what], "calls"), []
    assert total > 40
    for at in range(1, total + 1):
        count = Count(at, KINDS[at % 3])
        found.append(
            check(backend, "qwen3", SIZES[what], lambda s, act, c=count: attempt(where(s, "calls", c), act))
        )
    # nothing was in flight, so nothing need be lost
    assert found.count("undone") > total // 2 and found.count("lost") <= total // 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", SIZES)
def test_an_interrupt_at_any_line_changes_nothing(backend: str, what: str) -> None:
    total = places(backend, "qwen3", SIZES[what], "lines")
    assert total > 200
    for at in range(1, total + 1, total // 60):
        count = Count(at)
        check(backend, "qwen3", SIZES[what], lambda s, act, c=count: attempt(where(s, "lines", c), act))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", SIZES)
def test_sliding_windows_are_undone_too(backend: str, what: str) -> None:
    total = places(backend, "gemma3_text", SIZES[what], "calls")
    for at in range(1, total + 1, max(1, total // 12)):
        count = Count(at, KINDS[at % 3])
        check(backend, "gemma3_text", SIZES[what], lambda s, act, c=count: attempt(where(s, "calls", c), act))


def test_states_are_undone_too() -> None:
    total = places("mlx", "qwen3_next", 12, "calls")
    for at in range(1, total + 1, max(1, total // 12)):
        count = Count(at, KINDS[at % 3])
        assert (
            check("mlx", "qwen3_next", 12, lambda s, act, c=count: attempt(where(s, "calls", c), act))
            != "lost"
        )


def failing_late(stock: Callable[..., Any], when: Callable[[Any], bool]) -> Callable[..., Any]:
    """A module's function whose result, when it is time, MLX cannot compute: building it raises nothing."""

    def poisoned(self: Any, x: Any) -> Any:
        out = stock(self, x)
        if not when(self):
            return out
        return out + mx.linalg.inv(mx.zeros((3, 3)), stream=mx.cpu).sum()

    return poisoned


@pytest.mark.parametrize("size", [1, 4, 12])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_mlx_fails_at_when_it_evaluates_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, size: int, layer: int
) -> None:
    def break_off(side: Side, act: Callable[[], Any]) -> bool:
        mlp = side.model.model.layers[layer].mlp
        with monkeypatch.context() as patch:
            patch.setattr(type(mlp), "__call__", failing_late(type(mlp).__call__, lambda one: one is mlp))
            # without a cache nothing of ours is run: it is MLX that fails, and only once it computes
            stock = side.model(mx.array([TEXT[:size]]))
            with pytest.raises(RuntimeError, match="Inverse"):
                mx.eval(stock)
            with pytest.raises(RuntimeError, match="Inverse"):
                act()
        return True

    found = check("mlx", "qwen3", size, break_off)
    assert found == ("undone" if size > FEW else "lost")


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("options", [{"budget": 9, "buffer": 3}, {"policy": "full"}])
def test_what_fails_in_flight_loses_the_cache(
    monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    side = side_of("mlx", family)
    cache, kind, calls = side.cache(**options), type(side.model.model.layers[0].mlp), 0

    def late(_: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls > 6 * len(side.model.layers)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", failing_late(kind.__call__, late))
        with pytest.raises(RuntimeError, match="Inverse"):
            mlx_kvret.generate(side.model, None, TEXT[:30], cache=cache, max_tokens=20)
    with pytest.raises(CacheError, match="MLX failed"):
        side.read(cache, TEXT[:2])
    with pytest.raises(CacheError, match="MLX failed"):
        cache.kept_positions()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_that_does_not_fit_names_the_chunk_that_does(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = side_of(backend)
    module = (
        mlx_kvret.mlx_backend.reading
        if backend == "mlx"
        else importlib.import_module("mlx_kvret.cuda_backend.layer")
    )
    stock = module.attend

    def small(queries: Any, *rest: Any) -> Any:
        if queries.shape[2] > 9:
            raise MemoryError("out of memory (made up)")
        return stock(queries, *rest)

    cache = side.cache(budget=9, buffer=3)
    with monkeypatch.context() as patch:
        patch.setattr(module, "attend", small)
        with pytest.raises(CacheError, match=r"after 0 tokens .*prefill_step_size=8 fits"):
            mlx_kvret.generate(side.model, None, TEXT[:40], cache=cache, prefill_step_size=32, max_tokens=2)
    assert cache.seen == 0
    text = mlx_kvret.generate(side.model, None, TEXT[:40], cache=cache, prefill_step_size=8, max_tokens=2)
    fresh = {"budget": 9, "buffer": 3, "prefill_step_size": 8, "max_tokens": 2}
    assert text == mlx_kvret.generate(side.model, None, TEXT[:40], **fresh)
