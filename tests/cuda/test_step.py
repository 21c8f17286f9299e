"""The fixed decoding step against plain forward passes. A CPU cannot capture it in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import assert_near

from mlx_kvret.cuda_backend.step import FixedStep, decoder_step

from .tiny import attached, new_cache, run

IDS = torch.randint(1, 96, (2, 90), generator=torch.Generator().manual_seed(6))


def fixed_step(model: Any, cache: Any) -> FixedStep:
    return FixedStep(
        model, {"cache": cache}, cache.shared, lambda t: run(model, t, cache)[:, -1], capture=False
    )


@pytest.mark.parametrize(
    "options", [{}, {"scope": "head"}, {"buffer": 40}, {"policy": "recent"}, {"threshold": 0.1}], ids=str
)
@pytest.mark.parametrize("prompt", [5, 30])
def test_a_fixed_step_is_a_plain_pass(options: dict[str, Any], prompt: int) -> None:
    model, _ = attached("qwen3")
    caches = [new_cache(model, **{"budget": 10, "buffer": 4} | options) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:, :prompt], cache)
    step = fixed_step(model, caches[0])
    for place in range(prompt, 90):
        token = IDS[:, place : place + 1]
        assert_near(step(token), run(model, token, caches[1])[:, -1], 64)
        if place % 7 == 0:
            assert str(caches[0].kept_positions(1)) == str(caches[1].kept_positions(1))
    assert 1 <= step.captures <= 3
    assert caches[0].seen == caches[1].seen == 90 and caches[0].entries == caches[1].entries


def test_plain_passes_may_come_between(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = attached("llama")
    caches = [new_cache(model, budget=10, buffer=9) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:, :40], cache)
    step = fixed_step(model, caches[0])
    for place in range(40, 80):
        token = IDS[:, place : place + 1]
        ours = run(model, token, caches[0])[:, -1] if place % 5 == 0 else step(token)
        assert_near(ours, run(model, token, caches[1])[:, -1], 64)
    assert str(caches[0].kept_positions()) == str(caches[1].kept_positions())


def test_without_a_gpu_steps_are_plain() -> None:
    model, _ = attached("llama")
    assert not isinstance(decoder_step(model, new_cache(model)), FixedStep)


def test_rows_may_have_clocks_of_their_own() -> None:
    model, _ = attached("qwen3")
    caches = []
    for _ in range(2):
        together = new_cache(model, budget=10, buffer=4)
        run(model, IDS[:1, :33], together)
        for row, start in ((1, 9), (0, 2)):
            other = new_cache(model, budget=8, buffer=3)
            run(model, IDS[row : row + 1, start:40], other)
            together.extend(other)
        caches.append(together)
    step = fixed_step(model, caches[0])
    for place in range(40, 90):
        token = IDS[[0, 1, 0], place : place + 1]
        assert_near(step(token), run(model, token, caches[1])[:, -1], 64)
        if place == 60:
            for cache in caches:
                cache.filter([2, 0, 1])
    assert [str(caches[0].kept_positions(row)) for row in range(3)] == [
        str(caches[1].kept_positions(row)) for row in range(3)
    ]
    assert 1 <= step.captures <= 4 and caches[0].shared is not None
    assert [row.seen for row in caches[0].shared.rows] == [88, 83, 81]
