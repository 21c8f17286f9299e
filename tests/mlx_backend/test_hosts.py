"""What mlx-lm asks of a bounded cache is answered truly: absent, no, or a yes that holds."""

import copy

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import cache as mlx_cache
from tiny import forward, gated, pieces, prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError
from mlx_kvret.mlx_backend.entry import BoundedKVCache
from mlx_kvret.mlx_backend.generation import TokenIds

BATCHES = ["merge", "extract", "filter", "extend", "prepare", "finalize"]
SMALL = {"budget": 12, "buffer": 8}
NAMES = ["qwen3", "gemma3_text", "deepseek_v3", "falcon_h1"]


def bounded(entry):
    return any(isinstance(part, BoundedKVCache) for part in getattr(entry, "caches", (entry,)))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_done_is_absent(name, tmp_path):
    model, absent = gated(name), [*BATCHES[1:], "to_quantized"]
    cache = mlx_kvret.make_cache(model, **SMALL)
    forward(model, prompt(20), cache)
    mlx_cache.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = mlx_cache.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    forward(model, [1], loaded)
    for entries in (cache, mlx_cache.make_prompt_cache(model), copy.deepcopy(cache), loaded):
        asked = [entry for entry in entries if bounded(entry)]
        assert asked and not any(hasattr(e, method) for e in asked for method in absent)
        assert all(hasattr(e, "merge") == (name in ("qwen3", "gemma3_text")) for e in asked)
        assert not any(hasattr(type(entry), method) for entry in asked for method in BATCHES)
    full = mlx_kvret.make_cache(model, policy="full")
    assert all(hasattr(entry, "merge") for entry in full)


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("name", NAMES[:3])
def test_trimmable_means_any_number_also_of_a_copy(name, chunk):
    model, answers = gated(name), set()
    cache = mlx_kvret.make_cache(model, **SMALL)
    for part in pieces(prompt(40), [chunk]):
        forward(model, part, cache)
        entries = [entry for entry in cache if isinstance(entry, BoundedKVCache)]
        answers.add(can := mlx_cache.can_trim_prompt_cache(entries))
        for count in (1, cache.seen // 2, cache.seen) if can else ():
            twin = [entry for entry in copy.deepcopy(cache) if isinstance(entry, BoundedKVCache)]
            assert mlx_cache.trim_prompt_cache(twin, count) == count
            assert twin[0].offset == cache.seen - count
        if not can:
            assert mlx_cache.trim_prompt_cache(entries, 1) == 0
    assert answers == ({False} if chunk > 8 else {True, False})


def test_a_prompt_cache_of_mlx_lm_reuses_what_it_can():
    model, lru = gated(), mlx_cache.LRUPromptCache()
    for length in (5, 6, 60):
        ids = prompt(length, seed=length)
        cache = mlx_cache.make_prompt_cache(model)
        forward(model, ids, cache)
        lru.insert_cache("model", ids, cache)
        # one that begins alike is cut back, or read again where entries are gone
        found, rest = lru.fetch_nearest_cache("model", [*ids[:3], 63, 62])
        found = found or mlx_cache.make_prompt_cache(model)
        assert found[0].offset + len(rest) == 5
        fresh = forward(model, [*ids[:3], 63, 62], mlx_cache.make_prompt_cache(model))
        assert abs(forward(model, rest, found)[-1] - fresh[-1]).max() < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_mlx_lm_drafts_with_an_evicting_cache_and_refuses_where_it_cannot_take_back(name):
    model, draft = gated(name, seed=0), tiny(name, seed=0)
    mlx_kvret.attach(model, random_gates(shape_of(model)), budget=24, buffer=8)
    options = {"draft_model": draft, "num_draft_tokens": 3, "max_tokens": 30}
    cache = mlx_cache.make_prompt_cache(model)
    both = [*cache, *mlx_cache.make_prompt_cache(draft)]
    found = list(mlx_lm.stream_generate(model, TokenIds(), prompt(60), prompt_cache=both, **options))
    assert len(found) == 30 and cache.seen == 90 and cache.entries <= 32 * shape_of(model).heads
    assert any(response.from_draft for response in found)
    mlx_kvret.attach(draft, policy="recent", budget=8, buffer=1)
    with pytest.raises(UnsupportedFeatureError, match="draft"):
        mlx_kvret.generate(model, None, prompt(60), **options)


def test_bits_are_refused_with_the_reason():
    model = gated()
    for given in (None, mlx_kvret.make_cache(model)):
        with pytest.raises(UnsupportedFeatureError, match="kv_bits=4"):
            mlx_lm.generate(model, TokenIds(), [1, 2], prompt_cache=given, kv_bits=4)
    mlx_kvret.detach(model)
    assert mlx_lm.generate(model, TokenIds(), [1, 2], kv_bits=8, kv_group_size=32, max_tokens=2)


def test_attaching_says_which_caches_mlx_lm_s_functions_make():
    model = tiny()
    mlx_kvret.attach(model, policy="recent", budget=20, buffer=3, sinks=2)
    for cache in (mlx_cache.make_prompt_cache(model), mlx_kvret.make_cache(model)):
        config = cache.shared.config
        assert (config.policy, config.budget, config.buffer, config.sinks) == ("recent", 20, 3, 2)
    assert mlx_kvret.make_cache(model, budget=9, policy="knorm").shared.config.budget == 9
    assert mlx_kvret.make_cache(copy.deepcopy(model)).shared.config.budget == 20
    assert mlx_lm.generate(model, TokenIds(), prompt(50), max_tokens=3)
    gates = random_gates(shape_of(model))
    for options, message in (
        ({"budgets": 3}, "budget"),
        ({"budget": 0}, "budget"),
        ({"budget": 64}, "no retention gates"),
        ({"policy": "learned"}, "no retention gates"),
    ):
        with pytest.raises(ConfigError, match=message):
            mlx_kvret.attach(model, **options)
        assert mlx_kvret.make_cache(model).shared.config.budget == 20, "a refusal leaves all as it was"
    mlx_kvret.attach(model, gates, budget="40KB")
    assert mlx_cache.make_prompt_cache(model).shared.config.policy == "learned"


def test_attached_without_gates_and_options_a_cache_must_be_given():
    model = mlx_kvret.attach(tiny())
    with pytest.raises(ConfigError, match=r"attach\(model, policy='recent'\)"):
        mlx_lm.generate(model, TokenIds(), [1, 2])
    cache = mlx_kvret.make_cache(model, policy="recent", budget=8)
    assert mlx_lm.generate(model, TokenIds(), [1, 2], prompt_cache=cache, max_tokens=2)
    assert cache.seen == 4


def test_loops_taken_in_turns_leave_the_callers_stream_in_force():
    """mlx-lm's own would stay in force after both, and passes of the user's would run ahead of the device."""
    model = gated()
    before, seen = mx.default_stream(mx.default_device()), []
    caches = [mlx_kvret.make_cache(model, budget=8) for _ in range(2)]
    loops = [mlx_kvret.stream_generate(model, None, [1, 2, 3], cache=cache, max_tokens=5) for cache in caches]
    for _ in zip(*loops, strict=True):
        seen.append(mx.default_stream(mx.default_device()))
    loops = [mlx_kvret.stream_generate(model, None, [1, 2], budget=8, max_tokens=5) for _ in range(2)]
    for loop in loops:
        next(loop)
    for loop in loops:
        loop.close()
    seen.append(mx.default_stream(mx.default_device()))
    assert seen == [before] * 6
    assert caches[0].seen == caches[1].seen == 8
