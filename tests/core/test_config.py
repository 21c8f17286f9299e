"""What configurations refuse, in which words, and what they fill in."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_kvret.core.budget import CacheShape, tokens_within
from mlx_kvret.core.config import DEFAULT_BUDGET, EvictionConfig, GateConfig
from mlx_kvret.errors import ConfigError

GATES = {"kind": "rg10", "layers": 3, "kv_heads": 2, "hidden_size": 8, "width": 4}
NO_COUNTS = [0, -1, 1.5, "2", True, None]


def refuses(cls, options, *words):
    with pytest.raises(ConfigError) as caught:
        cls(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["layers", "kv_heads", "hidden_size", "width"])
@pytest.mark.parametrize("value", NO_COUNTS)
def test_gate_sizes(name, value):
    refuses(GateConfig, GATES | {name: value}, f"gate {name} is {value!r}", "whole number of at least 1")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("kind", "rg2", "gate kind is 'rg2'; expected one of rg, rg10"),
        ("kind", ["rg"], "gate kind is ['rg']"),
        ("activation", "tanh", "gate activation is 'tanh'; expected one of silu, gelu"),
        ("training_budget", 0, "training_budget is 0; expected a whole number of at least 1"),
        ("shared_projection", 1, "shared_projection is 1; expected true or false"),
        ("base_model", None, "base_model is None; expected a text"),
        ("base_fingerprint", 3, "base_fingerprint is 3; expected a text"),
        ("bias_init", float("nan"), "bias_init is nan; expected a finite number"),
        ("bias_init", float("-inf"), "bias_init is -inf"),
        ("bias_init", 10**400, "expected a finite number"),
        ("bias_init", "18", "bias_init is '18'"),
        ("bias_init", True, "bias_init is True"),
    ],
)
def test_gate_options(name, value, expected):
    refuses(GateConfig, GATES | {name: value}, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": 0}, "budget is 0; expected a whole number of at least 1"),
        ({"budget": -5}, "budget is -5"),
        ({"budget": 12.0}, "budget is 12.0"),
        ({"budget": True}, "budget is True"),
        ({"buffer": -1}, "buffer is -1; expected a whole number of at least 0"),
        ({"min_per_head": -1}, "min_per_head is -1"),
        ({"sinks": 1.5}, "sinks is 1.5"),
        ({"window": None}, "window is None"),
        ({"policy": "random", "policy_seed": -1}, "policy_seed is -1"),
        ({"policy": "random", "policy_seed": 2**32}, "policy_seed is 4294967296"),
        ({"policy_seed": 1}, "draws nothing"),
        ({"lookahead": 10**30}, "at most 2147483647"),
        ({"budget": 10**12}, "at most 2147483647"),
        ({"threshold": 10**400}, "threshold is"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"lookahead": 0}, "lookahead is 0; expected a whole number of at least 1"),
        ({"scope": "token"}, "scope is 'token'; expected one of global, layer, head"),
        ({"policy": "lru"}, "policy is 'lru'; expected one of learned, recent, random, knorm, keydiff, full"),
        ({"budget": 8, "sinks": 4, "window": 5}, "sinks + window is 4 + 5, more than the budget of 8; lower"),
        ({"budget": 8, "min_per_head": 9}, "min_per_head is 9, more than the budget of 8"),
        ({"threshold": 0}, "threshold is 0; expected α with 0 < α <= 1"),
        ({"threshold": 1.01}, "threshold is 1.01"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.5"}, "threshold is '0.5'"),
        ({"threshold": True}, "threshold is True"),
        ({"policy": "recent", "lookahead": 2}, "act on learned scores, the policy is 'recent'"),
        ({"policy": "full", "threshold": 0.5}, "act on learned scores, the policy is 'full'"),
    ],
)
def test_eviction_options(options, expected):
    refuses(EvictionConfig, options, expected)
    with pytest.raises(ConfigError):
        EvictionConfig.from_dict(options)


def test_limits_are_allowed():
    EvictionConfig(1, 0, sinks=1, min_per_head=1, threshold=1)
    EvictionConfig(1, 0, window=1, threshold=1e-300)
    EvictionConfig(2**31 - 1, 2**31 - 1, lookahead=2**31 - 1)


@pytest.mark.parametrize("cls", [GateConfig, EvictionConfig])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([1], "is a list; expected an object with named fields"),
        (None, "is a NoneType"),
        (GATES | {"colour": 1, "budget": 5, "temperature": 2}, "unknown fields"),
    ],
)
def test_not_from_a_dictionary(cls, data, expected):
    with pytest.raises(ConfigError, match=expected):
        cls.from_dict(data)


@pytest.mark.parametrize(
    ("policy", "stored", "seed"),
    [("random", 3, 3), ("random", 2**40 + 3, 3), ("learned", 3, 0), ("recent", 0, 0)],
)
def test_the_seed_of_earlier_files_goes_on_as_the_policy_s(policy, stored, seed):
    data = EvictionConfig.create(64, policy=policy).to_dict()
    del data["policy_seed"]
    assert EvictionConfig.from_dict(data | {"seed": stored}).policy_seed == seed
    for wrong in (-1, "3", True):
        with pytest.raises(ConfigError, match="seed is"):
            EvictionConfig.from_dict(data | {"seed": wrong})
    with pytest.raises(ConfigError, match="unknown fields seed"):
        EvictionConfig.from_dict(data | {"seed": 1, "policy_seed": 1})


@pytest.mark.parametrize("policy", ["learned", "recent", "knorm", "keydiff", "full"])
def test_a_seed_that_nothing_draws_with_is_refused(policy):
    for seed in (0, 5):
        with pytest.raises(ConfigError, match=f"policy_seed is {seed}, the policy is '{policy}'"):
            EvictionConfig.create(64, policy=policy, policy_seed=seed)
    assert EvictionConfig.create(64, policy="random", policy_seed=5).policy_seed == 5


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match=r"incomplete.*hidden_size"):
        GateConfig.from_dict({"kind": "rg", "layers": 1, "kv_heads": 1})


@pytest.mark.parametrize(
    "config",
    [
        GateConfig(**GATES),
        GateConfig("rg", 1, 1, 1, training_budget=64, shared_projection=False, base_model="β"),
        EvictionConfig(),
        EvictionConfig(7, 0, "layer", "learned", 1, 2, 3, 4, 0.25),
        EvictionConfig(7, 0, "layer", "random", 1, 2, 3, policy_seed=6),
    ],
)
def test_json_round_trip(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_learned_defaults_trust_the_gates():
    assert EvictionConfig.create() == EvictionConfig(DEFAULT_BUDGET, DEFAULT_BUDGET // 8, "global", "learned")
    assert EvictionConfig.create(5, policy="full").buffer == 1
    assert EvictionConfig.create(100, buffer=0, min_per_head=3, lookahead=9) == EvictionConfig(
        100, 0, min_per_head=3, lookahead=9
    )


def test_baseline_defaults_protect_sinks_and_window():
    assert EvictionConfig.create(512, policy="knorm") == EvictionConfig(
        512, 64, "head", "knorm", sinks=4, window=32
    )
    assert EvictionConfig.create(512, policy="recent", scope="global", sinks=0, window=7) == EvictionConfig(
        512, 64, "global", "recent", window=7
    )


@given(st.integers(1, 300), st.sampled_from(["learned", "recent", "random", "knorm", "keydiff", "full"]))
def test_defaults_fit_every_budget(budget, policy):
    config = EvictionConfig.create(budget, policy=policy)
    assert config.sinks + config.window <= budget // 2 and config.buffer >= 1


@pytest.mark.parametrize("options", [{"budget": "9"}, {"budget": 0}, {"policy": "best"}, {"window": "8"}])
def test_create_refuses_before_it_computes(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is"):
        EvictionConfig.create(**options)


def test_default_buffer_is_the_one_that_memory_is_planned_with():
    shape = CacheShape(2, 2, 64, 64, 2, 256)
    budget = tokens_within(10**6, shape, None)
    buffer = EvictionConfig.create(budget).buffer
    assert tokens_within(10**6, shape, buffer) == budget


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("kind", "maps"), [("rg", 2), ("rg10", 3)])
def test_tensor_layout(kind, maps, shared):
    config = GateConfig(**GATES | {"kind": kind, "shared_projection": shared})
    shapes = config.tensor_shapes()
    last = f"linear{maps}.weight"
    assert config.projections[-1] == f"linear{maps}"
    for layer in range(3):
        assert shapes[f"layers.{layer}.linear1.weight"] == (4, 8)
        assert shapes[f"layers.{layer}.linear1.bias"] == (4,)
        assert shapes.get(f"layers.{layer}.linear2.bias") == ((4,) if kind == "rg10" else None)
    owners = ["shared"] if shared else ["layers.0", "layers.1", "layers.2"]
    for owner in owners:
        assert shapes[f"{owner}.{last}"] == (2, 4) and shapes[f"{owner}.bias"] == (2,)
    assert len(shapes) == 3 * 2 * (maps - 1) + 2 * len(owners)
