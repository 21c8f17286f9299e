"""Recorded decoding steps against plain passes. A CPU cannot record: the stand-in calls the step again."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from rounding import assert_near
from torch._dynamo.testing import CompileCounter

import mlx_kvret
from mlx_kvret.cuda_backend import compiling, recording
from mlx_kvret.cuda_backend.generation import TokenIds
from mlx_kvret.cuda_backend.recording import Called
from mlx_kvret.cuda_backend.step import FixedStep, PlainStep, decoder_step
from mlx_kvret.errors import CacheError, ConfigError
from mlx_kvret.serving.batched import Batched
from mlx_kvret.serving.engine import OneByOne
from mlx_kvret.serving.on_torch import OnTorch, greedy

from .tiny import attached, new_cache, run

IDS = torch.randint(1, 96, (3, 90), generator=torch.Generator().manual_seed(6))


def fixed_step(model: Any, cache: Any, make: Any = Called) -> FixedStep:
    return FixedStep(model, cache, make)


def kept(cache: Any) -> list[str]:
    return [str(cache.kept_positions(row)) for row in range(cache.rows)]


def compare(model: Any, caches: list[Any], step: Any, ids: torch.Tensor, start: int, end: int) -> None:
    """Tokens ``start`` to ``end`` by recorded steps into the first cache, by plain passes into the second."""
    for place in range(start, end):
        token = ids[:, place : place + 1]
        assert_near(step(token, torch.clone), run(model, token, caches[1])[:, -1], 64)
        if place % 11 == 0:
            assert kept(caches[0]) == kept(caches[1])
    assert caches[0].seen == caches[1].seen and caches[0].entries == caches[1].entries
    assert kept(caches[0]) == kept(caches[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "head"}, {"buffer": 40}, {"policy": "recent"}, {"threshold": 0.1}, {"buffer": 0}],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 5, 30])
def test_a_fixed_step_is_a_plain_pass(options: dict[str, Any], prompt: int) -> None:
    model, _ = attached("qwen3")
    caches = [new_cache(model, **{"budget": 10, "buffer": 4} | options) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:2, :prompt], cache)
    step = fixed_step(model, caches[0])
    compare(model, caches, step, IDS[:2], prompt, 60)
    assert caches[0].seen == 60
    # from the first token on: the pool is at its full size when decoding begins
    assert step.captures == 1 and not step.failed


@pytest.mark.parametrize("prompt", [3, 15, 16, 17, 40])
@pytest.mark.parametrize("rows", [1, 3])
def test_sliding_windows_stand_in_rings(prompt: int, rows: int) -> None:
    model, _ = attached("gemma3_text")
    caches = [new_cache(model, budget=10, buffer=4) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:rows, :prompt], cache)
    step = fixed_step(model, caches[0])
    compare(model, caches, step, IDS[:rows], prompt, 50)
    # whoever looks finds the layers as a plain pass leaves them
    twins = [copy.deepcopy(cache) for cache in caches]
    for ours, theirs in zip(twins[0].layers, twins[1].layers, strict=True):
        if ours.is_sliding:
            assert ours.cumulative_length == theirs.cumulative_length == 50
            assert_near(ours.keys, theirs.keys, 64)
            assert_near(ours.values, theirs.values, 64)
    compare(model, caches, step, IDS[:rows], 50, 60)
    for cache in caches:
        run(model, IDS[:rows, 60:70], cache)
    compare(model, caches, step, IDS[:rows], 70, 80)
    assert step.captures == 1 and not step.failed
    assert caches[0].nbytes < 2 * caches[1].nbytes


def test_tokens_are_taken_back_from_rings_that_are_not_full() -> None:
    model, _ = attached("gemma3_text")
    caches = [new_cache(model, budget=40, buffer=20) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:1, :4], cache)
    step = fixed_step(model, caches[0])
    compare(model, caches, step, IDS[:1], 4, 12)
    for cache in caches:
        assert cache.take_back(3)
    compare(model, caches, step, IDS[:1], 9, 40)


def test_plain_passes_may_come_between() -> None:
    model, _ = attached("llama")
    caches = [new_cache(model, budget=10, buffer=9) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:2, :40], cache)
    step = fixed_step(model, caches[0])
    for place in range(40, 80):
        token = IDS[:2, place : place + 1]
        ours = run(model, token, caches[0])[:, -1] if place % 5 == 0 else step(token, torch.clone)
        assert_near(ours, run(model, token, caches[1])[:, -1], 64)
    assert kept(caches[0]) == kept(caches[1])


def test_without_a_gpu_steps_are_plain() -> None:
    model, _ = attached("llama")
    assert isinstance(decoder_step(model, new_cache(model)), PlainStep)


def test_rows_may_have_clocks_of_their_own_and_leave() -> None:
    model, _ = attached("qwen3")
    caches = []
    for _ in range(2):
        together = new_cache(model, budget=10, buffer=4)
        run(model, IDS[:1, :33], together)
        for row, start in ((1, 9), (2, 2)):
            other = new_cache(model, budget=8, buffer=3)
            run(model, IDS[row : row + 1, start:40], other)
            together.extend(other)
        caches.append(together)
    step, order = fixed_step(model, caches[0]), [0, 1, 2]
    compare(model, caches, step, IDS[order], 40, 60)
    for keep in ([2, 0, 1], [2, 0], [1]):
        for cache in caches:
            cache.filter(keep)
        order = [order[at] for at in keep]
        compare(model, caches, step, IDS[order], 60, 75)
        compare(model, caches, step, IDS[order], 75, 90)
    # 3 rows and 2 of them in the same bucket or another; slabs that are given back move the others
    assert 2 <= step.captures <= 4 and not step.failed


class Failing(Called):
    """Fails like a GPU: while it records, or when it repeats; and tells what was recorded."""

    at: tuple[str, int] = ("", 0)
    error: type[BaseException] = RuntimeError
    calls: list[str]

    def __init__(self) -> None:
        self.whole = False

    def _told(self, what: str) -> None:
        self.calls.append(what)
        if self.at == (what, self.calls.count(what)):
            raise self.error("the device says no\nmore")

    def record(self, work: Any, prepare: Any) -> None:
        super().record(work, prepare)
        self._told("record")
        self.whole = True

    def repeat(self, work: Any) -> None:
        assert self.whole, "half a recording was repeated"
        super().repeat(work)
        self._told("repeat")


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [("record", 1), ("repeat", 1), ("repeat", 9)], ids=str)
def test_what_fails_is_not_repeated(family: str, error: type[BaseException], at: tuple[str, int]) -> None:
    model, _ = attached(family)
    caches = [new_cache(model, budget=10, buffer=4) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:1, :20], cache)
    make = type("Own", (Failing,), {"at": at, "error": error, "calls": []})
    step = fixed_step(model, caches[0], make)
    told = []
    for place in range(20, 60):
        token = IDS[:1, place : place + 1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                ours = step(token, torch.clone)
            except KeyboardInterrupt:
                assert caches[0].seen == place
                # what was not recorded is recorded anew
                ours = step(token, torch.clone)
        told += caught
        assert_near(ours, run(model, token, caches[1])[:, -1], 64)
    assert kept(caches[0]) == kept(caches[1]) and caches[0].seen == 60
    if error is KeyboardInterrupt:
        assert not told and not step.failed
    else:
        (warning,) = told
        assert "RuntimeError: the device says no" in str(warning.message) or error is not RuntimeError
        assert "more" not in str(warning.message) and step.failed


def test_a_model_that_waits_for_its_device_decodes_in_plain_passes() -> None:
    model, _ = attached("qwen2")
    caches = [new_cache(model, budget=10, buffer=4) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:1, :20], cache)
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda m, a, out: out * float(out.sum() > -1e9))
    step = fixed_step(model, caches[0])
    with pytest.warns(UserWarning, match="waits for its device in every step"):
        step(IDS[:1, 20:21], torch.clone)
    run(model, IDS[:1, 20:21], caches[1])
    compare(model, caches, step, IDS[:1], 21, 40)
    assert step.captures == 0


def test_a_choice_that_fails_leaves_the_token_out() -> None:
    model, _ = attached("llama")
    caches = [new_cache(model, budget=10, buffer=4) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:1, :20], cache)
    step = fixed_step(model, caches[0])
    compare(model, caches, step, IDS[:1], 20, 30)
    with pytest.raises(ZeroDivisionError):
        step(IDS[:1, 30:31], lambda logits: 1 // 0)
    assert caches[0].seen == 30
    compare(model, caches, step, IDS[:1], 30, 60)
    caches[0].lose("it was dropped")
    with pytest.raises(CacheError, match="dropped"):
        step(IDS[:1, 60:61], torch.clone)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_everybody_decodes_in_recorded_steps(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model, _ = attached(family)
    prompts = [IDS[0, :30].tolist(), IDS[1, :7].tolist(), IDS[2, :45].tolist()]
    together = family == "qwen3"

    def answers() -> list[Any]:
        said: list[Any] = [mlx_kvret.generate(model, None, p, budget=12, max_tokens=12) for p in prompts]
        drawn = {"budget": 12, "max_tokens": 6, "temp": 1.0, "seed": 3, "repetition_penalty": 1.2}
        said.append([r.token for r in mlx_kvret.stream_generate(model, None, prompts[1], **drawn)])
        # as serving does where rows have one clock, and where they stand in a batch
        backend = OnTorch(model, TokenIds(), {"budget": 12})
        for engine in (OneByOne(backend), Batched(backend, 2))[: 1 + together]:
            cache = backend.new_cache(None)
            backend.read(cache, prompts[1][:-1])
            engine.join(cache, prompts[1][-1], greedy)
            said.append([step.token for _ in range(6) for step in engine.step()])
        if together:
            limits = [9, 5, 7]
            said += mlx_kvret.generate_batch(model, None, prompts, budget=[12, 9, 30], max_tokens=limits)
            drawn = {"budget": 12, "max_tokens": 6, "temp": 1.0, "seed": 1}
            said += mlx_kvret.generate_batch(model, None, prompts, rows=2, **drawn)
        return said

    expected = answers()
    made: list[Called] = []

    def make() -> Called:
        made.append(Called())
        return made[-1]

    plain: list[int] = []
    monkeypatch.setattr(recording, "recorder", lambda device: make)
    monkeypatch.setattr(PlainStep, "__call__", lambda *_: plain.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answers() == expected
    # one recording for each answer, and for each number of rows
    assert (len(made) >= 7 if together else len(made) == 5) and not plain


@pytest.mark.parametrize(("family", "graphs"), [("qwen3", 1), ("gemma3_text", 2)])
def test_layers_are_compiled_one_for_all(monkeypatch: pytest.MonkeyPatch, family: str, graphs: int) -> None:
    # what inductor makes of the graphs needs a compiler for this machine, and minutes
    monkeypatch.setattr(compiling, "BACKEND", CompileCounter())
    model, _ = attached(family)
    vars(model)["_kvret_compile"] = True
    caches = [new_cache(model, budget=10, buffer=4) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:2, :20], cache)
    step = fixed_step(model, caches[0])
    compare(model, caches, step, IDS[:2], 20, 40)
    # without a break, and no layer of a kind anew
    assert compiling.BACKEND.frame_count == graphs and not step.failed and step.captures == 1
    assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)


def test_what_cannot_be_compiled_decodes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    model, _ = attached("qwen3")
    vars(model)["_kvret_compile"] = True
    caches = [new_cache(model, budget=10, buffer=4) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:1, :20], cache)
    step = fixed_step(model, caches[0])
    with pytest.warns(UserWarning, match="because compiling failed: .* no compiler here") as told:
        compare(model, caches, step, IDS[:1], 20, 40)
    assert len(told) == 1 and step.captures == 1 and not step.failed
    with pytest.raises(ConfigError, match="recorded steps, of which cpu has none"):
        mlx_kvret.load("demo", backend="torch", compile=True)
