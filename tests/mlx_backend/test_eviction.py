"""Small budgets: a cache always holds exactly what the numpy policy keeps, and never more than its bound."""

import copy
from functools import cache as once

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from oracle import Oracle, recording
from tiny import ARCHITECTURES, gated, shape_of

import mlx_kvret
from mlx_kvret.core.config import EvictionConfig

model_of = once(gated)


@st.composite
def configs(draw, policies=("learned", "recent", "random", "knorm", "keydiff")):
    """Any valid eviction configuration with a budget of up to 12 tokens per head."""
    policy = draw(st.sampled_from(policies))
    budget = draw(st.integers(1, 12))
    sinks = draw(st.integers(0, budget))
    options = {
        "budget": budget,
        "buffer": draw(st.integers(0, 7)),
        "scope": draw(st.sampled_from(["global", "layer", "head"])),
        "min_per_head": draw(st.integers(0, budget)) if draw(st.booleans()) else 0,
        "sinks": sinks if draw(st.booleans()) else 0,
        "window": draw(st.integers(0, budget - sinks)) if draw(st.booleans()) else 0,
    }
    if policy == "random":
        options["policy_seed"] = draw(st.integers(0, 3))
    if policy == "learned" and draw(st.booleans()):
        options |= {
            "lookahead": draw(st.integers(1, 9)),
            "threshold": draw(st.sampled_from([None, 1e-3, 0.5, 1.0])),
        }
    return EvictionConfig(policy=policy, **options)


def options(config):
    """As arguments, where a seed that nothing draws with is refused."""
    drawn = () if config.policy == "random" else ("policy_seed",)
    return {name: value for name, value in config.to_dict().items() if name not in drawn}


WAYS = st.sampled_from(["fork", "save", "snapshot"])
STEPS = st.lists(st.one_of(st.integers(1, 24), st.just(1), WAYS), min_size=4, max_size=12)


def read(model, cache, oracle, count, seed=0):
    # no token twice: in the first layer its keys would have the same norm
    tokens = np.random.default_rng(seed).permutation(model.args.vocab_size)
    model(mx.array(tokens[None, oracle.seen : oracle.seen + count]), cache=cache)
    oracle.step(count)
    oracle.check(cache)


def reloaded(model, cache, path):
    """The cache after a way through mlx-lm's prompt file."""
    save_prompt_cache(path, cache)
    return mlx_kvret.mlx_backend.hooks.checked_cache(model, load_prompt_cache(path))


def snapshot(model, cache, path):
    """The cache after a way through a file that every backend opens."""
    mlx_kvret.save_cache(model, cache, path)
    return mlx_kvret.load_cache(model, path)[0]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), steps=STEPS, seed=st.integers(0, 9))
def test_kept_positions_are_the_oracle_s(monkeypatch, tmp_path, config, steps, seed):
    # not a model that normalises its keys: their norms would differ by rounding only
    model = model_of("llama", vocab_size=512)
    cache, left = mlx_kvret.make_cache(model, **options(config)), []
    oracle = Oracle(shape_of(model), config)
    with recording(monkeypatch) as watch:
        watch(cache, oracle)
        for step in steps:
            if isinstance(step, int):
                read(model, cache, oracle, step, seed)
                continue
            left.append((cache, oracle))
            path = str(tmp_path / "cache.safetensors")
            ways = {"fork": lambda _, c, __: copy.deepcopy(c), "save": reloaded, "snapshot": snapshot}
            twin = ways[step](model, cache, path)
            cache, oracle = twin, oracle.fork()
            watch(cache, oracle)
        for cache, oracle in left:
            oracle.check(cache)
            read(model, cache, oracle, 9, seed)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("scope", ["global", "layer", "head"])
def test_every_architecture(monkeypatch, name, scope):
    model = model_of(name)
    config = EvictionConfig(budget=6, buffer=3, scope=scope, min_per_head=1)
    cache, oracle = mlx_kvret.make_cache(model, **options(config)), Oracle(shape_of(model), config)
    with recording(monkeypatch) as watch:
        watch(cache, oracle)
        for count in (11, 1, 1, 17, *[1] * 20):
            read(model, cache, oracle, count)
    assert oracle.compactions > 3
