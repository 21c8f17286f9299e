"""How tokens are drawn and logits are changed, on both backends, against the same in numpy."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.sample_utils import make_sampler
from transformers import GenerationConfig

import mlx_kvret
import mlx_kvret.cuda_backend.sampling
import mlx_kvret.mlx_backend.sampling
from mlx_kvret.core.sampling import Sampling
from mlx_kvret.errors import ConfigError

IDS = [7, 3, 90, 12, 55, 3, 3, 61]
BACKENDS = {
    "mlx": (mlx_kvret.mlx_backend.sampling, mx.array, ["top_p", "min_p", "xtc", "top_k"]),
    "torch": (mlx_kvret.cuda_backend.sampling, torch.tensor, ["top_k", "top_p", "min_p", "xtc"]),
}
LOGITS = np.random.default_rng(4).permutation(np.linspace(0, 3, 14)).astype(np.float32)
LIKELY = np.argsort(-LOGITS).tolist()


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(backend):
    return mlx_kvret.load("demo", backend=backend)


def cut(step: str, p: np.ndarray, asked: Sampling) -> np.ndarray:
    """Probabilities after one way of leaving tokens out."""
    order = np.argsort(-p)
    out = np.zeros(len(p), bool)
    if step == "top_k" and asked.top_k:
        out[order[asked.top_k :]] = True
    if step == "top_p":
        out[order[np.cumsum(p[order]) - p[order] >= asked.top_p]] = True
    if step == "min_p":
        out = p < asked.min_p * p.max()
        out[order[: asked.min_tokens_to_keep]] = False
    if step == "xtc" and asked.xtc_probability:
        above = order[p[order] > asked.xtc_threshold]
        out[above[:-1]] = True
        out[list(asked.xtc_special_tokens or [])] = False
    p = np.where(out, 0, p)
    return p / p.sum()


def probabilities(backend: str, asked: Sampling) -> np.ndarray:
    """How likely each token is to be drawn; transformers' temperature comes first, mlx-lm's last."""
    first, last = (1, asked.temp) if backend == "mlx" else (asked.temp, 1)
    p = np.exp(LOGITS.astype(np.float64) / first)
    p /= p.sum()
    for step in BACKENDS[backend][2]:
        p = cut(step, p, asked)
    p **= 1 / last
    return p / p.sum()


def draws(backend: str, asked: Sampling, count: int) -> list[int]:
    module, array, _ = BACKENDS[backend]
    logprobs = LOGITS - np.log(np.exp(LOGITS).sum())
    return module.sampler_of(asked)(array(np.tile(logprobs, (count, 1)))).tolist()


DRAWS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "top_k of all": {"top_k": 14},
    "top_k of more": {"top_k": 99},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "min_p of all": {"min_p": 1.0},
    "min_tokens_to_keep": {"min_p": 0.9, "min_tokens_to_keep": 4},
    "min_tokens_to_keep of more": {"min_p": 0.9, "min_tokens_to_keep": 99},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.08},
    "xtc with none above": {"xtc_probability": 1.0, "xtc_threshold": 0.5},
    "xtc with tokens that stay": {
        "xtc_probability": 1.0, "xtc_threshold": 0.08, "xtc_special_tokens": LIKELY[:1],
    },
    "all": {"top_k": 9, "top_p": 0.9, "min_p": 0.1, "xtc_probability": 1.0, "xtc_threshold": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("temp", [1.0, 0.6, 3])
@pytest.mark.parametrize("case", DRAWS)
def test_every_token_is_drawn_as_often_as_it_should_be(backend, case, temp):
    asked, count = Sampling(temp=temp, seed=5, **DRAWS[case]), 4000
    p = probabilities(backend, asked)
    found = np.bincount(draws(backend, asked, count), minlength=len(p))
    assert not found[p == 0].any()
    assert (np.abs(found - count * p) <= 5 * np.sqrt(count * p * (1 - p))).all()
    assert found.tolist() == np.bincount(draws(backend, asked, count), minlength=len(p)).tolist()


OWN = {"top_k": 9, "top_p": 0.9, "min_p": 0.05}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, OWN], ids=["temp", "top_p", "all"])
@pytest.mark.parametrize("temp", [0.7, 2.0])
def test_the_same_seed_draws_what_the_host_draws(backend, loaded, temp, options):
    logprobs = np.tile(LOGITS - np.log(np.exp(LOGITS).sum()), (50, 1))
    found = draws(backend, Sampling(temp, seed=3, **options), 50)
    if backend == "mlx":
        mx.random.seed(3)
        own = make_sampler(temp, **options)(mx.array(logprobs)).tolist()
    else:
        torch.manual_seed(3)
        asked = GenerationConfig(do_sample=True, temperature=temp, **{"top_k": 0} | options)
        process = loaded[0]._get_logits_processor(asked)
        own = torch.multinomial(process(None, torch.tensor(logprobs)).softmax(-1), 1)[:, 0].tolist()
    assert found == own


def test_xtc_happens_as_often_as_asked(backend):
    asked = Sampling(temp=1.0, seed=2, xtc_probability=0.3, xtc_threshold=0.1)
    module, array, _ = BACKENDS[backend]
    sampler, shares = module.sampler_of(asked), np.array([[0.96, 0.2 - 0.06, 0.0]])
    logprobs = array(np.log(np.maximum(shares / shares.sum(), 1e-30)).astype(np.float32))
    # the likeliest of two choices is drawn at 0.87, and never where choices are excluded
    p, count = 0.7 * 0.96 / shares.sum(), 600
    found = sum(int(sampler(logprobs)[0]) == 0 for _ in range(count))
    assert abs(found - count * p) < 5 * (count * p * (1 - p)) ** 0.5 < count * (0.87 - p)


def changed(ids: list[int], logits: np.ndarray, asked: Sampling) -> np.ndarray:
    """Logits with the bias and the penalties."""
    logits = logits.copy()
    for token, added in (asked.logit_bias or {}).items():
        logits[token] += added
    for token in range(len(logits)):
        if asked.repetition_penalty and token in ids[-asked.repetition_context_size :]:
            low = logits[token] < 0
            logits[token] *= asked.repetition_penalty if low else 1 / asked.repetition_penalty
        if asked.presence_penalty and token in ids[-asked.presence_context_size :]:
            logits[token] -= asked.presence_penalty
        if asked.frequency_penalty:
            logits[token] -= asked.frequency_penalty * ids[-asked.frequency_context_size :].count(token)
    return logits


CHANGES: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {3: 2.5, 0: -100}},
    "repetition": {"repetition_penalty": 1.7},
    "repetition, looking back": {"repetition_penalty": 1.7, "repetition_context_size": 3},
    "presence": {"presence_penalty": 0.8},
    "frequency": {"frequency_penalty": 0.8},
    "frequency, negative": {"frequency_penalty": -0.8, "frequency_context_size": 4},
    "all": {
        "logit_bias": {3: 2.5}, "repetition_penalty": 1.3, "repetition_context_size": 5,
        "presence_penalty": 0.4, "presence_context_size": 2, "frequency_penalty": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_logits_are_changed_as_in_numpy(backend, case):
    asked, (module, array, _) = Sampling(**CHANGES[case]), BACKENDS[backend]
    ids, logits = [2, 9, 3, 9, 9, 1, 0, 9], np.linspace(-2, 3, 14, dtype=np.float32)
    found = array(logits[None])
    for process in module.processors_of(asked):
        found = process(array(ids) if backend == "mlx" else array([ids]), found)
    np.testing.assert_allclose(np.array(found.tolist())[0], changed(ids, logits, asked), rtol=1e-6, atol=1e-6)
    assert not np.array_equal(changed(ids, logits, asked), logits)


def test_penalties_that_do_nothing_cost_nothing(backend):
    idle = Sampling(repetition_penalty=1, presence_penalty=0, frequency_penalty=0.0, logit_bias={})
    assert BACKENDS[backend][0].processors_of(idle) == []
    assert BACKENDS[backend][0].processors_of(Sampling(repetition_penalty=0)) == []


# ---------------------------------------------------------------- in a generation


def tokens(loaded, **options: Any) -> list[int]:
    room = {"budget": 64, "max_tokens": 8}
    return [r.token for r in mlx_kvret.stream_generate(*loaded, IDS, **room | options)]


def naive(backend: str, model: Any, asked: Sampling, count: int) -> list[int]:
    """The likeliest tokens one by one, each after the whole text is read anew."""
    ids = list(IDS)
    for _ in range(count):
        given = BACKENDS[backend][1]([ids])
        cache = mlx_kvret.make_cache(model, policy="full")
        out = model(given, cache=cache)
        logits = np.array((out if backend == "mlx" else out.logits)[0, -1].tolist(), np.float32)
        ids.append(int(changed(ids, logits, asked).argmax()))
    return ids[len(IDS) :]


@pytest.mark.parametrize("case", [case for case in CHANGES if case != "bias"])
def test_an_answer_under_penalties_is_that_of_a_naive_loop(backend, loaded, case):
    options = {name: 9 * v if name.endswith("_penalty") else v for name, v in CHANGES[case].items()}
    found = tokens(loaded, **options)
    assert found == naive(backend, loaded[0], Sampling(**options), len(found)) != tokens(loaded)


def test_a_bias_forces_and_forbids(loaded):
    first = tokens(loaded)[0]
    assert set(tokens(loaded, logit_bias={42: 1000})) == {42}
    assert tokens(loaded, logit_bias={first: -1000})[0] != first
    forced = {"logit_bias": {42: 1000}, "temp": 1.0, "seed": 1}
    assert set(tokens(loaded, **forced)) == {42}


def test_one_choice_is_the_likeliest(loaded):
    for only in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.001}):
        assert tokens(loaded, temp=9.0, seed=3, **only) == tokens(loaded) != tokens(loaded, temp=9.0, seed=3)


def test_other_processors_come_last(loaded):
    seen: list[Any] = []

    def look(ids: Any, logits: Any) -> Any:
        seen.append(float(logits[0, 42]))
        return logits

    tokens(loaded, logit_bias={42: 500}, logits_processors=[look], max_tokens=2)
    assert seen and min(seen) > 300


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"logit_bias": {10**6: 1.0}}, "logit_bias holds token id 1000000, the model's are 0 to"),
        ({"temp": 1.0, "xtc_probability": 0.5, "xtc_special_tokens": [10**6]}, "xtc_special_tokens holds"),
        ({"top_kk": 3}, "did you mean top_k"),
        ({"sampler": len, "temp": 1.0, "top_k": 3}, "drop temp, top_k, or drop it"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(loaded, options, says):
    with pytest.raises(ConfigError, match=says):
        mlx_kvret.stream_generate(*loaded, IDS, **options)


# ---------------------------------------------------------------- speculative decoding


@pytest.mark.parametrize("case", CHANGES)
def test_drafts_change_nothing_under_penalties(case):
    """The demo's own model drafts for it, and one with other weights."""
    loaded = mlx_kvret.load("demo", backend="mlx")
    draft = mlx_kvret.detach(mlx_kvret.load("demo", None, backend="mlx")[0])
    for other, count in itertools.product((False, True), (1, 3)):
        if other:
            draft.model.norm.weight = -draft.model.norm.weight
        drafted = tokens(loaded, draft_model=draft, num_draft_tokens=count, **CHANGES[case])
        assert drafted == tokens(loaded, **CHANGES[case])


def test_drafts_without_a_limit_of_tokens():
    loaded = mlx_kvret.load("demo", backend="mlx")
    draft = mlx_kvret.detach(mlx_kvret.load("demo", None, backend="mlx")[0])
    stream = mlx_kvret.stream_generate(*loaded, IDS, budget=64, max_tokens=-1, draft_model=draft)
    assert [r.token for r in itertools.islice(stream, 6)] == tokens(loaded)[:6]
    stream.close()
