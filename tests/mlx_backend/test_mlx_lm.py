"""mlx-lm's functions on an attached model: generation, prompt files, copies, trimming, drafts, refusals."""

import copy
from itertools import chain

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from rounding import assert_near
from tiny import forward, gated, pieces, prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret.errors import CheckpointError, ConfigError, ModelMismatchError, UnsupportedFeatureError
from mlx_kvret.mlx_backend.cache import BoundedCache
from mlx_kvret.mlx_backend.entry import BoundedKVCache
from mlx_kvret.mlx_backend.generation import TokenIds

PROMPT = prompt(70)
SMALL = {"budget": 12, "buffer": 4}
NAMES = ["qwen3", "gemma3_text", "deepseek_v3", "qwen3_next", "falcon_h1"]


def positions(cache):
    return [head.tolist() for layer in cache.kept_positions() for head in layer]


def tokens(model, cache, start, count, chunk=2048):
    """Greedy tokens of mlx-lm's loop."""
    found = mlx_lm.stream_generate(
        model, TokenIds(), mx.array(start), max_tokens=count, prompt_cache=cache, prefill_step_size=chunk
    )
    return [response.token for response in found]


def by_hand(model, cache, start, count, chunk):
    """The same, one forward pass after the other."""
    for part in pieces(start[:-1], [chunk]):
        forward(model, part, cache)
    found, token = [], start[-1]
    for _ in range(count):
        token = int(forward(model, [token], cache)[-1].argmax())
        found.append(token)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_plain_forward_passes(name):
    model = gated(name)
    one, other = (mlx_kvret.make_cache(model, **SMALL) for _ in range(2))
    assert tokens(model, one, PROMPT, 30, chunk=16) == by_hand(model, other, PROMPT, 30, chunk=16)
    assert one.entries <= 16 * shape_of(model).heads
    forward(model, [0], other)  # mlx-lm has fed its last token too
    assert one.seen == other.seen == 100


def test_an_attached_model_makes_bounded_caches_of_itself():
    model = gated()
    cache = make_prompt_cache(model)
    assert isinstance(cache, BoundedCache) and cache.shared.config.budget == 1024
    assert mlx_lm.generate(model, TokenIds(), PROMPT, max_tokens=5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("read", [0, 7, 70])
def test_a_prompt_file_goes_on_exactly(tmp_path, name, read):
    model, path = gated(name), str(tmp_path / "prompt.safetensors")
    cache = mlx_kvret.make_cache(model, **SMALL)
    for part in pieces(PROMPT[:read], [16]):
        forward(model, part, cache)
    if read == 0 and name != "qwen3":
        return  # mlx-lm saves no empty cache of other kinds
    save_prompt_cache(path, cache, {"note": "kept"})
    loaded, notes = load_prompt_cache(path, return_metadata=True)
    assert notes == {"note": "kept"}
    assert tokens(model, loaded, [5, 6], 20) == tokens(model, cache, [5, 6], 20)
    save_prompt_cache(path, loaded)
    again = mlx_kvret.mlx_backend.hooks.checked_cache(model, load_prompt_cache(path))
    assert positions(again) == positions(cache) and again.seen == cache.seen
    one, other = (mlx_kvret.generate(model, None, [9], cache=c, max_tokens=9) for c in (again, cache))
    assert one == other


def test_a_prompt_file_is_refused_by_another_model_other_gates_and_no_gates(tmp_path):
    model, path = gated(), str(tmp_path / "prompt.safetensors")
    cache = mlx_kvret.make_cache(model, **SMALL)
    forward(model, PROMPT, cache)
    save_prompt_cache(path, cache)
    others = {
        "intermediate_size": gated(intermediate_size=64),
        "layers": gated(num_hidden_layers=3),
        "gates": gated(gates={"bias": (2.0, 3.0)}),
        "gates are missing": mlx_kvret.attach(tiny()),
    }
    for reason, other in others.items():
        with pytest.raises(ModelMismatchError, match=reason):
            mlx_kvret.generate(other, None, [1], cache=load_prompt_cache(path))
    with pytest.raises(ModelMismatchError, match="gates"):
        forward(others["gates"], [1], load_prompt_cache(path))


def test_a_prompt_file_without_a_bounded_cache_is_refused():
    with pytest.raises(CheckpointError, match="no bounded cache"):
        BoundedKVCache.from_state([])
    for cache in (mlx_lm.models.cache.make_prompt_cache(tiny()), "cache", {}):
        with pytest.raises(ConfigError, match="make_cache"):
            mlx_kvret.generate(gated(), None, [1], cache=cache)


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent(name):
    model = gated(name)
    cache = mlx_kvret.make_cache(model, **SMALL)
    forward(model, PROMPT, cache)
    twin, third = copy.deepcopy(cache), copy.deepcopy(cache)
    before = positions(cache)
    first = tokens(model, twin, [3], 30)
    assert positions(cache) == before != positions(twin) and cache.seen == 70
    assert tokens(model, cache, [3], 30) == first == tokens(model, third, [3], 30)


@pytest.mark.parametrize("policy", ["learned", "keydiff"])
def test_taking_back_the_newest_tokens(policy):
    model = gated()
    cache, other = (mlx_kvret.make_cache(model, policy=policy, **SMALL) for _ in range(2))
    for part in pieces(PROMPT, [20, 1]):
        forward(model, part, cache), forward(model, part, other)
    kept = positions(other)
    forward(model, [1, 2, 3, 4, 5, 6], cache)  # more than the buffer, not compacted yet
    # asked as prefix caches ask, who would take back any number: no
    assert not can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 6) == 0
    assert [layer.trim(6) for layer in cache] == [6, 6]
    assert (cache.seen, positions(cache)) == (70, kept)
    assert_near(forward(model, [7], cache), forward(model, [7], other), 64)
    with pytest.raises(UnsupportedFeatureError, match="cannot take back 60"):
        cache[0].trim(60)


@pytest.mark.parametrize("draft_tokens", [1, 3, 6])
@pytest.mark.parametrize("alike", [True, False])
def test_speculative_decoding_is_greedy_and_takes_back_exactly(monkeypatch, draft_tokens, alike):
    # the draft agrees always (the same weights) or hardly ever
    model, draft, passes = gated(seed=0), tiny(seed=0 if alike else 1), []
    call, trim = type(model).__call__, BoundedKVCache.trim

    def noted_call(self, inputs, *args, **kwargs):
        passes.append(inputs[0].tolist())
        return call(self, inputs, *args, **kwargs)

    def noted_trim(self, n):
        if self.layer == 0:
            passes[-1] = passes[-1][: len(passes[-1]) - n]
        return trim(self, n)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "__call__", noted_call)
        patch.setattr(BoundedKVCache, "trim", noted_trim)
        cache = mlx_kvret.make_cache(model, budget=12, buffer=8)
        options = {"draft_model": draft, "num_draft_tokens": draft_tokens}
        stream = mlx_kvret.stream_generate(model, None, PROMPT, max_tokens=40, cache=cache, **options)
        last = list(stream)[-1]
    assert (last.seen, last.entries) == (cache.seen, cache.entries)

    # what was accepted, read pass by pass without a draft, is what greedy decoding gives
    plain, expected = mlx_kvret.make_cache(model, budget=12, buffer=8), []
    for accepted in passes:
        expected += forward(model, accepted, plain).argmax(1).tolist()
    assert positions(cache) == positions(plain) and cache.entries <= 20 * 4
    assert [*chain(*passes)][len(PROMPT) :] == expected[len(PROMPT) - 1 : -1]
    assert any(len(accepted) > 1 for accepted in passes[1:]) or not alike


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_speculative_decoding_within_the_budget_is_exact(draft_tokens):
    model, draft = gated(seed=0), tiny(seed=1)
    options = {"max_tokens": 40, "budget": 200}
    expected = [r.token for r in mlx_kvret.stream_generate(model, None, PROMPT, **options)]
    drafted = mlx_kvret.stream_generate(
        model, None, PROMPT, draft_model=draft, num_draft_tokens=draft_tokens, **options
    )
    assert [r.token for r in drafted] == expected


def test_what_cannot_work_is_refused():
    model = gated()
    cache = mlx_kvret.make_cache(model)
    forward(model, [1, 2], cache)
    with pytest.raises(UnsupportedFeatureError, match="kv_bits"):
        mlx_lm.generate(model, TokenIds(), [1, 2], prompt_cache=cache, kv_bits=4, quantized_kv_start=0)
    with pytest.raises(UnsupportedFeatureError, match="max_kv_size"):
        mlx_lm.generate(model, TokenIds(), [1, 2], max_kv_size=32)
    with pytest.raises(UnsupportedFeatureError, match="batch"):
        model(mx.zeros((2, 3), mx.int32), cache=mlx_kvret.make_cache(model))
    latent = gated("deepseek_v3")
    with pytest.raises(UnsupportedFeatureError, match=r"batched generation .*latent attention"):
        batches = BatchGenerator(latent)
        batches.insert([[1, 2, 3], [4, 5]])
        for _ in range(3):
            batches.next()
    for option in ({"kv_group_size": 32}, {"max_kv_size": 32}, {"prompt_cache": cache}):
        with pytest.raises(UnsupportedFeatureError, match=next(iter(option))):
            mlx_kvret.generate(model, None, [1, 2], **option)


def test_taking_back_broken_off_half_way_is_noticed():
    model = gated()
    cache = mlx_kvret.make_cache(model)
    forward(model, [1, 2, 3], cache)
    cache[0].trim(1)
    with pytest.raises(mlx_kvret.errors.CacheError, match="half way"):
        forward(model, [1], cache)


def test_deferred_gates_keep_the_same(monkeypatch):
    model, kept = gated(), []
    for defer in (1, 32):
        monkeypatch.setattr("mlx_kvret.core.budget.CacheShape.deferred", lambda *_, g=defer: g)
        cache = mlx_kvret.make_cache(model, budget=20, buffer=40)
        tokens(model, cache, PROMPT, 130, chunk=30)
        assert cache.shared.arena.defer == defer
        kept.append(positions(cache))
    assert kept[0] == kept[1] and random_gates(shape_of(model))
