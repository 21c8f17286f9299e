"""What transformers asks of a bounded cache is answered truly; generate uses the attached model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import mlx_kvret
from mlx_kvret.cuda_backend.cache import cache_name
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError

from .tiny import run, tiny_model

IDS = torch.randint(1, 96, (1, 40), generator=torch.Generator().manual_seed(0))
GREEDY: Any = {"max_new_tokens": 9, "do_sample": False}
SMALL: Any = {"policy": "recent", "budget": 8, "buffer": 4}
ABSENT = ["reorder_cache", "offload", "prefetch", "reset", "batch_repeat_interleave", "batch_select_indices"]


@pytest.fixture(scope="module")
def model() -> Any:
    return mlx_kvret.attach(tiny_model("qwen3"), **SMALL)


def test_what_cannot_be_done_is_absent(model: Any) -> None:
    cache, full = mlx_kvret.make_cache(model), mlx_kvret.make_cache(model, policy="full")
    run(model, IDS, cache)
    for held in (cache, cache.layers[0], copy.deepcopy(cache)):
        assert not any(hasattr(held, name) for name in ABSENT)
    assert not (cache.is_compileable or cache.is_initialized or any(cache.is_sliding))
    assert all(hasattr(full, name) for name in ABSENT)
    found = model.generate(IDS, num_beams=2, **{cache_name(model): full}, **GREEDY)
    stock = tiny_model("qwen3").generate(IDS, num_beams=2, **GREEDY)
    assert torch.equal(found, stock)


@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_croppable_means_that_all_can_be_cropped(model: Any, chunk: int) -> None:
    cache, answers = mlx_kvret.make_cache(model), set()
    for part in IDS.split(chunk, 1):
        run(model, part, cache)
        answers.add(cache.is_croppable)
        if cache.is_croppable:
            twin = copy.deepcopy(cache)
            twin.crop(-cache.seen)
            assert twin.seen == 0
    assert answers == ({False} if chunk == 40 else {True, False})
    before, kept = cache.seen, cache.kept_positions()
    with pytest.raises(UnsupportedFeatureError, match="cannot crop"):
        cache.crop(-before)
    assert cache.seen == before and str(cache.kept_positions()) == str(kept)
    cache.activate_past_recording()
    run(model, IDS[:, :3], cache)
    assert cache.is_croppable
    cache.crop(torch.tensor(-3))
    assert cache.seen == before and str(cache.kept_positions()) == str(kept)


def test_generate_makes_what_the_model_was_attached_for(model: Any) -> None:
    name, cache = cache_name(model), mlx_kvret.make_cache(model)
    assert cache.shared.config.budget == 8
    expected = model.generate(IDS, **{name: cache}, **GREEDY)
    out = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected) and out[name].entries <= 12 * 6
    assert torch.equal(copy.deepcopy(model).generate(IDS, **GREEDY), expected)
    draft = tiny_model("qwen3", seed=1)
    assert torch.equal(model.generate(IDS, assistant_model=draft, **GREEDY), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_found_under_either_name(model: Any, name: str) -> None:
    if name == "cache" and cache_name(model) != "cache":
        pytest.skip("this release of transformers refuses the name itself")
    cache = mlx_kvret.make_cache(model)
    model.generate(IDS, **{name: cache}, **GREEDY)
    seen = cache.seen
    assert seen >= 48
    with torch.no_grad():
        model(IDS, **{name: cache})
    assert cache.seen == seen + 40


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "beam search"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"use_cache": False, "given": True}, "use_cache=False"),
    ],
)
def test_what_generate_cannot_do_is_refused_before_it_begins(model: Any, options: Any, message: str) -> None:
    cache, rest = mlx_kvret.make_cache(model), dict(options)
    given = {cache_name(model): cache} if rest.pop("given", False) else {}
    with pytest.raises(UnsupportedFeatureError, match=message):
        model.generate(IDS, **rest, **given, **GREEDY)
    assert cache.seen == 0


def test_an_attached_model_does_not_draft(model: Any) -> None:
    with pytest.raises(UnsupportedFeatureError, match="cannot draft for another"):
        tiny_model("qwen3").generate(IDS, assistant_model=model, **GREEDY)


def test_attaching_without_gates_and_options_and_with_wrong_ones() -> None:
    model = mlx_kvret.attach(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"attach\(model, policy='recent'\)"):
        model.generate(IDS, **GREEDY)
    mlx_kvret.attach(model, **SMALL)
    expected = model.generate(IDS, **GREEDY)
    for options in ({"budgets": 3}, {"budget": 0}, {"budget": 64}, {"policy": "learned"}):
        with pytest.raises(ConfigError):
            mlx_kvret.attach(model, **options)
        assert torch.equal(model.generate(IDS, **GREEDY), expected), "a refusal leaves all as it was"
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedFeatureError, match="was set to 'sdpa'"):
        model.generate(IDS, **GREEDY)
    mlx_kvret.detach(model)
    stock = tiny_model("llama").generate(IDS, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), stock)


@pytest.mark.parametrize("own", [{}, SMALL])
def test_generate_takes_the_options_of_a_cache(own: Any) -> None:
    model = mlx_kvret.attach(tiny_model("qwen3"), None, **own)
    given = {"policy": "knorm", "budget": 6, "buffer": 2}
    cache = mlx_kvret.make_cache(model, **given)
    expected = model.generate(IDS, prefill_chunk_size=8, **{cache_name(model): cache}, **GREEDY)
    asked: Any = {f"kvret_{name}": value for name, value in given.items()}
    told = model.generate(IDS, prefill_chunk_size=8, return_dict_in_generate=True, **asked, **GREEDY)
    assert torch.equal(told.sequences, expected)
    held = told.past_key_values
    assert str(held.kept_positions()) == str(cache.kept_positions()) and held.seen == cache.seen
    rows = model.generate(torch.cat([IDS, IDS]), prefill_chunk_size=8, **asked, **GREEDY)
    assert torch.equal(rows, torch.cat([expected, expected]))
    with pytest.raises(ConfigError, match="kvret_budget has no effect beside"):
        model.generate(IDS, kvret_budget=5, **{cache_name(model): held}, **GREEDY)
    with pytest.raises(ConfigError, match="did you mean budget"):
        model.generate(IDS, kvret_bugdet=5, **GREEDY)
    with pytest.raises(ConfigError, match="no retention gates"):
        model.generate(IDS, kvret_policy="learned", **GREEDY)
    mlx_kvret.detach(model)
    with pytest.raises(ValueError, match="kvret_budget"):
        model.generate(IDS, kvret_budget=5, **GREEDY)
