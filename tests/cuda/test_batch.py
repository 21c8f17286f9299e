"""Continuous batching: every answer is that of its prompt alone, whatever stands beside it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import mlx_kvret
from mlx_kvret.cuda_backend.batch import BatchGenerator, Response
from mlx_kvret.errors import CacheError, ConfigError, ModelMismatchError, UnsupportedFeatureError

from .tiny import attached, new_cache, run

SIZES = {"completion_batch_size": 4, "prefill_batch_size": 3, "prefill_step_size": 13}


def prompt(length: int) -> list[int]:
    return torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def drained(generator: BatchGenerator, uids: list[int]) -> dict[int, list[Response]]:
    found: dict[int, list[Response]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response)
    return found


def alone(model: Any, ids: list[int], count: int, **options: Any) -> tuple[list[int], Any]:
    cache = new_cache(model, **options)
    stream = mlx_kvret.stream_generate(model, None, ids, cache=cache, max_tokens=count, prefill_step_size=13)
    return [response.token for response in stream], cache


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_answers_are_those_of_the_prompts_alone(family: str) -> None:
    model, _ = attached(family)
    prompts = [prompt(n) for n in (30, 7, 51, 14, 61, 1, 2)]
    budgets, counts = [12, 20, 8, 16, 12, 9, 30], [20, 3, 11, 1, 17, 20, 9]
    caches = [new_cache(model, budget=budget, buffer=4) for budget in budgets]
    generator = BatchGenerator(model, **SIZES)
    uids = generator.insert(prompts[:5], counts[:5], caches=caches[:5])
    first = [generator.next() for _ in range(6)]
    late = generator.insert(prompts[5:], counts[5:], caches=caches[5:])
    found = drained(generator, uids + late)
    for _, given in reversed(first):
        for response in given:
            found[response.uid].insert(0, response)
    for uid, ids, budget, count in zip(uids + late, prompts, budgets, counts, strict=True):
        tokens, cache = alone(model, ids, count, budget=budget, buffer=4)
        last = found[uid][-1]
        assert [response.token for response in found[uid]] == tokens
        assert last.finish_reason == "length" and last.all_tokens == ids + tokens
        assert str(last.prompt_cache.kept_positions()) == str(cache.kept_positions())
        # it goes on by itself
        ours, theirs = (run(model, torch.tensor([[5, 6]]), one) for one in (last.prompt_cache, cache))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(cache.seen == 0 for cache in caches), "what was given stays as it is"


def test_histories_samplers_processors_and_stops() -> None:
    model, _ = attached("qwen3")
    options = {"budget": 10, "buffer": 4}
    told, cache = alone(model, prompt(20), 5, **options)
    twin = copy.deepcopy(cache)
    stream = mlx_kvret.stream_generate(
        model, None, prompt(9), cache=twin, max_tokens=12, prefill_step_size=13
    )
    answer = [response.token for response in stream]
    seen: list[list[int]] = []

    def watch(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return logits

    generator = BatchGenerator(model, max_tokens=12, **SIZES)
    uids = generator.insert(
        [prompt(9), prompt(9), prompt(9)],
        caches=[cache, cache, None],
        all_tokens=[prompt(20) + told, prompt(20) + told, []],
        samplers=[None, lambda logprobs: logprobs.argmax(-1), lambda logprobs: logprobs.argmin(-1)],
        logits_processors=[[watch], None, None],
        stop_sequences=[None, [answer[2:4]], None],
    )
    found = drained(generator, uids)
    assert [r.token for r in found[uids[0]]] == answer
    assert [r.token for r in found[uids[1]]] == answer[:4] and found[uids[1]][-1].finish_reason == "stop"
    assert len(found[uids[2]]) == 12 and cache.seen == 25
    known = prompt(20) + told + prompt(9)
    assert seen == [known + answer[:n] for n in range(13)]
    np.testing.assert_allclose(found[uids[0]][0].logprobs.exp().sum(), 1, rtol=1e-5)


def test_rows_are_removed_at_any_stage() -> None:
    model, _ = attached("llama")
    generator = BatchGenerator(model, max_tokens=9, **SIZES)
    uids = generator.insert([prompt(n) for n in (5, 40, 6, 7)])
    for _ in range(2):
        generator.next()
    found = generator.remove([uids[0], uids[1], uids[3]], return_prompt_caches=True)
    for uid, count in ((uids[0], 5), (uids[1], 26), (uids[3], 0)):
        cache, tokens = found[uid]
        assert cache is None or cache.seen == len(tokens)
        assert len(tokens) >= count
    rest = drained(generator, uids)
    assert [len(rest[uid]) for uid in uids] == [0, 0, 9, 0]
    assert [r.token for r in rest[uids[2]]] == alone(model, prompt(6), 9)[0]
    generator.close()
    assert generator.next() == ([], []) and generator.next_generated() == []


@pytest.mark.parametrize("what", ["model", "sampler"])
def test_a_step_that_fails_changes_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = attached("llama")
    fail = False

    def sampler(logprobs: torch.Tensor) -> torch.Tensor:
        if fail and what == "sampler":
            raise KeyboardInterrupt
        return logprobs.argmax(-1)

    stock = type(model.model.layers[1].mlp).forward

    def broken(self: Any, x: torch.Tensor) -> torch.Tensor:
        if fail and what == "model" and self is model.model.layers[1].mlp:
            raise KeyboardInterrupt
        return stock(self, x)

    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", broken)
    cache = {"budget": 8, "buffer": 3}
    generator = BatchGenerator(model, max_tokens=9, sampler=sampler, **SIZES)
    uids = generator.insert(
        [prompt(n) for n in (5, 30, 17)], caches=[new_cache(model, **cache) for _ in range(3)]
    )
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    for step in range(40):
        fail = step % 2 == 0
        try:
            responses = generator.next()[1]
        except KeyboardInterrupt:
            continue
        for response in responses:
            found[response.uid].append(response.token)
    fail = False
    assert [found[uid] for uid in uids] == [alone(model, prompt(n), 9, **cache)[0] for n in (5, 30, 17)]


def test_what_cannot_stand_in_a_batch_is_refused() -> None:
    model, _ = attached("llama")
    generator = BatchGenerator(model)
    for arguments, message in (
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [[1], [2]], "max_tokens": [3]}, "1 values for 2 prompts"),
        ({"prompts": [[999]]}, "token id 999"),
        ({"prompts": [[1]], "max_tokens": [0]}, "max_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            generator.insert(**arguments)
    with pytest.raises(UnsupportedFeatureError, match="policy 'full'"):
        generator.insert([[1]], caches=[new_cache(model, policy="full")])
    generator.insert([[1]])
    with pytest.raises(UnsupportedFeatureError, match="policy 'recent' cannot join"):
        generator.insert([[1]], caches=[new_cache(model, policy="recent")])
    with pytest.raises(ModelMismatchError):
        generator.insert([[1]], caches=[new_cache(attached("qwen3")[0])])
    pair = new_cache(model)
    run(model, torch.tensor([[1], [2]]), pair)
    with pytest.raises(ConfigError, match="2 sequences"):
        generator.insert([[1]], caches=[pair])
    with pytest.raises(ConfigError, match="prefill_step_size"):
        BatchGenerator(model, prefill_step_size=0)
    window, _ = attached("gemma3_text")
    with pytest.raises(UnsupportedFeatureError, match="DynamicSlidingWindowLayer"):
        BatchGenerator(window).insert([[1]])


def test_a_pass_in_the_arena_keeps_all_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = attached("llama")
    cache = new_cache(model, budget=8)
    run(model, torch.tensor([prompt(12)]), cache)
    other, met = cache.copy(), []
    stock = type(model.model.layers[1].mlp).forward

    def look(self: Any, x: torch.Tensor) -> torch.Tensor:
        for act in (lambda: other.entries, lambda: run(model, torch.tensor([[1]]), other), other.copy):
            with pytest.raises(CacheError, match="under way"):
                act()
            met.append(act)
        return stock(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[1].mlp), "forward", look)
        run(model, torch.tensor([[3]]), cache)
    assert len(met) == 9 and cache.seen == 13 and other.seen == 12


def test_rows_of_a_padded_batch_leave_and_are_saved(tmp_path: Any) -> None:
    model, _ = attached("qwen3")
    rows = torch.tensor([prompt(20), [0] * 6 + prompt(14)])
    together = new_cache(model, budget=8, buffer=4, policy="recent")
    run(model, rows, together, attention_mask=(rows != 0).long())
    single = together.row(1)
    assert single.seen == 14 and single.rows == 1
    kept = str(single.kept_positions())
    mlx_kvret.save_cache(model, single, tmp_path / "row.safetensors")
    together.filter([1])
    run(model, torch.tensor([[4]]), together)
    assert str(single.kept_positions()) == kept
    again, _ = mlx_kvret.load_cache(model, tmp_path / "row.safetensors")
    assert str(again.kept_positions()) == kept
    for one in (single, again):
        run(model, torch.tensor([[4]]), one)
        assert str(one.kept_positions()) == str(together.kept_positions())
    with pytest.raises(ConfigError, match="row 5 is not one"):
        together.row(5)
    with pytest.raises(ConfigError, match="name one twice"):
        together.filter([0, 0])


def test_rows_of_a_batch_with_windows_leave_unless_these_hold_padding() -> None:
    model, _ = attached("gemma3_text")
    rows = torch.tensor([prompt(20), prompt(22)[:20], [0] * 6 + prompt(14)])
    mask = (rows != 0).long()
    together, alone_ = new_cache(model, budget=8), new_cache(model, budget=8)
    run(model, rows, together, attention_mask=mask)
    run(model, rows[1:2], alone_)
    single = together.row(1)
    with pytest.raises(UnsupportedFeatureError, match="DynamicSlidingWindowLayer"):
        together.row(2)
    together.filter([2, 1])
    longer = torch.cat([mask[[2, 1]], torch.ones(2, 1, dtype=torch.long)], 1)
    both = run(model, torch.tensor([[4], [4]]), together, attention_mask=longer)
    for cache in (single, alone_):
        torch.testing.assert_close(run(model, torch.tensor([[4]]), cache), both[1:], rtol=1e-4, atol=1e-4)
        assert str(cache.kept_positions()) == str(together.kept_positions(1))
