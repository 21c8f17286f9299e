"""What a cache holds after a call, and whose it is: one contract, kept by both backends."""

from __future__ import annotations

import copy
from functools import cache as once
from typing import Any

import mlx_lm
import numpy as np
import pytest
import torch

import mlx_kvret
from mlx_kvret.errors import CacheError, ModelMismatchError
from mlx_kvret.mlx_backend.generation import TokenIds

from .sides import BACKENDS, Side, Words, fork, ids, kept, log_softmax

SMALL = {"budget": 10, "buffer": 4}
PROMPT = ids(23)
side_of = once(Side.of)


class Stop(Exception):
    """Of a consumer, a sampler or a callback."""


def told(side: Side, cache: Any, how: str, prompt: list[int] = PROMPT) -> list[int]:
    """The tokens a consumer was given of an answer that ended in some way."""
    found: list[int] = []
    calls = 0

    def sampler(logprobs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4 and how in ("sampler", "interrupt"):
            raise Stop if how == "sampler" else KeyboardInterrupt
        return side.greedy(logprobs)

    def callback(done: int, total: int) -> None:
        if how == "callback" and done == total:
            raise Stop

    tokenizer = Words(answer(side)[3]) if how == "end token" else Words()
    stream = mlx_kvret.stream_generate(
        side.model, tokenizer, prompt, cache=cache, max_tokens=1 if how == "one token" else 6,
        sampler=sampler, prompt_progress_callback=callback, prefill_step_size=7,
    )  # fmt: skip
    try:
        for response in stream:
            found.append(response.token)
            assert response.seen == cache.seen
            if how == "consumer" and len(found) == 3:
                raise Stop
            if how == "closed" and len(found) == 3:
                break
    except (Stop, KeyboardInterrupt):
        pass
    stream.close()  # type: ignore[attr-defined]
    return found


@once
def answer(side: Side) -> list[int]:
    options = {"max_tokens": 6, "prefill_step_size": 7}
    stream = mlx_kvret.stream_generate(side.model, None, PROMPT, cache=side.cache(**SMALL), **options)
    return [response.token for response in stream]


WAYS = {
    "max_tokens": 6, "one token": 1, "end token": 4, "closed": 3, "consumer": 3, "sampler": None,
    "interrupt": None, "callback": 0,
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", WAYS)
def test_a_cache_holds_the_prompt_and_every_token_that_was_given(backend: str, how: str) -> None:
    side = side_of(backend)
    cache, fed = side.cache(**SMALL), side.cache(**SMALL)
    found = told(side, cache, how)
    assert WAYS[how] is None or len(found) <= WAYS[how]
    assert cache.seen == len(PROMPT) + len(found)
    for part in (
        *(PROMPT[i : i + 7] for i in range(0, 21, 7)),
        PROMPT[21:22],
        PROMPT[22:],
        *([t] for t in found),
    ):
        side.read(fed, part)
    assert kept(cache) == kept(fed)
    np.testing.assert_allclose(side.read(cache, [5, 6]), side.read(fed, [5, 6]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["max_tokens", "end token", "closed", "sampler"])
def test_turns_go_on_as_the_dense_model_over_everything_said(backend: str, how: str) -> None:
    side = side_of(backend)
    cache, said = side.cache(budget=256), []
    for turn in range(3):
        prompt = PROMPT if turn == 0 else ids(4, turn)
        expected = log_softmax(side.dense([*said, *prompt])[-1])
        first = next(
            iter(mlx_kvret.stream_generate(side.model, None, prompt, cache=fork(cache), max_tokens=1))
        )
        np.testing.assert_allclose(side.logprobs(first), expected, rtol=0, atol=1e-3)
        said += [*prompt, *told(side, cache, how, prompt)]
        assert cache.seen == len(said)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_off_prompt_leaves_what_was_read(backend: str) -> None:
    side, cache = side_of(backend), side_of(backend).cache(**SMALL)

    def callback(done: int, total: int) -> None:
        if done >= 14:
            raise Stop

    options = {"prefill_step_size": 7, "prompt_progress_callback": callback}
    with pytest.raises(Stop):
        mlx_kvret.generate(side.model, None, PROMPT, cache=cache, **options)
    assert cache.seen == 14


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_cache_gets_the_begin_token_like_a_fresh_one(backend: str) -> None:
    side, cache = side_of(backend), side_of(backend).cache(**SMALL)
    seen = []
    for given in ({"cache": cache}, SMALL, {"cache": cache}):
        *_, last = mlx_kvret.stream_generate(side.model, Words(), "5 6 7", max_tokens=1, **given)
        seen.append(last.prompt_tokens)
    assert seen == [4, 4, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [[7], [7, 8, 9]])
@pytest.mark.parametrize("policy", ["learned", "recent"])
def test_a_cache_of_another_model_is_refused(backend: str, tokens: list[int], policy: str) -> None:
    side = Side.of(backend)
    cache = side.cache(policy=policy, **SMALL)
    expected = side.read(fork(cache), tokens)
    twin = Side(backend, copy.deepcopy(side.model))
    np.testing.assert_array_equal(twin.read(fork(cache), tokens), expected)
    others = {
        "detached": Side(backend, mlx_kvret.detach(copy.deepcopy(side.model))),
        "other weights": Side.of(backend, seed=5),
        "other gates": Side.of(backend, gate_seed=9),
    }
    for other in others.values():
        with pytest.raises(ModelMismatchError):
            other.read(cache, tokens)
        assert cache.seen == 0
    with pytest.raises(ModelMismatchError):
        mlx_kvret.generate(others["other weights"].model, None, tokens, cache=cache)
    same = Side.of(backend)
    np.testing.assert_array_equal(same.read(cache, tokens), expected)


def test_mlx_lm_s_own_loop_keeps_the_contract() -> None:
    side, said = side_of("mlx"), list(PROMPT)
    cache = side.cache(budget=256)
    for count in (4, 1):
        stream = mlx_lm.stream_generate(
            side.model, TokenIds(), [*said[cache.seen :], 5], prompt_cache=cache, max_tokens=9
        )
        said.append(5)
        said += [next(stream).token for _ in range(count)]
        stream.close()
        assert cache.seen == len(said)
    expected = side.dense([*said, 5])[-1]
    np.testing.assert_allclose(side.read(cache, [5])[-1], expected, rtol=0, atol=1e-3)


def test_drafts_leave_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    side, draft = side_of("mlx"), Side.of("mlx", seed=0).model
    mlx_kvret.detach(draft)
    for count in range(1, 7):
        cache = side.cache(budget=256)
        stream = mlx_kvret.stream_generate(
            side.model, None, PROMPT, cache=cache, draft_model=draft, num_draft_tokens=3, max_tokens=6
        )
        said = [*PROMPT, *(next(stream).token for _ in range(count))]
        stream.close()  # type: ignore[attr-defined]
        assert cache.seen == len(said)
        expected = side.dense([*said, 5])[-1]
        np.testing.assert_allclose(side.read(cache, [5])[-1], expected, rtol=0, atol=1e-3)


def test_transformers_generate_keeps_the_contract() -> None:
    side = side_of("torch")
    cache, text = side.cache(budget=256), torch.tensor([PROMPT])
    for _ in range(2):
        text = side.model.generate(text, cache=cache, max_new_tokens=5, do_sample=False)
        assert cache.seen == text.shape[1]
    whole = side.model.generate(torch.tensor([PROMPT]), cache=side.cache(budget=256), max_new_tokens=10)
    assert torch.equal(text, whole)
    with pytest.raises(CacheError, match="whole text"):
        side.model.generate(torch.tensor([[5]]), cache=cache)


def test_a_padded_batch_holds_its_last_tokens_where_they_stand() -> None:
    side = side_of("torch")
    rows = torch.tensor([PROMPT, [0] * 5 + PROMPT[:18]])
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    cache = side.cache(budget=256)
    text = side.model.generate(rows, attention_mask=mask, cache=cache, max_new_tokens=4, do_sample=False)
    alone = side.cache(budget=256)
    side.model.generate(rows[1:, 5:], cache=alone, max_new_tokens=4, do_sample=False)
    assert cache.seen == text.shape[1] and kept(alone) == [
        [positions.tolist() for positions in layer] for layer in cache.kept_positions(1)
    ]
    ours, theirs = cache.shared.rows[1], alone.shared.rows[0]
    assert (ours.seen, ours.length) == (theirs.seen, theirs.length)
    for layer in range(len(cache.competing)):
        newest = (row.newest(layer, 0, row.length)[0] for row in (ours, theirs))
        torch.testing.assert_close(*newest, rtol=0, atol=1e-5)
