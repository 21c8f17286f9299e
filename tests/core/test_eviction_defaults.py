"""What a user's eviction options mean beside those that gates bring with them."""

import json
import logging

import pytest

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionDefaults, GateConfig
from mlx_kvret.core.request import eviction
from mlx_kvret.errors import ConfigError

SHAPE = CacheShape(layers=3, kv_heads=2, key_dim=4, value_dim=4, itemsize=4, hidden_size=8)
WISHES = {"sinks": 4, "window": 8, "threshold": 1e-6, "scope": "layer", "min_per_head": 2}


GATES = {"kind": "rg10", "layers": 3, "kv_heads": 2, "hidden_size": 8, "width": 4}


def gates(**wishes):
    return GateConfig(**GATES, eviction=EvictionDefaults(**wishes))


@pytest.mark.parametrize("budget", [64, "64KB"])
def test_wishes_hold_where_nothing_is_said(budget):
    chosen = eviction(SHAPE, budget, gates=gates(**WISHES))
    assert {name: getattr(chosen, name) for name in WISHES} == WISHES


@pytest.mark.parametrize(
    "said", [{"sinks": 0}, {"window": 1}, {"threshold": 0.5}, {"threshold": None}, {"scope": "head"},
             {"min_per_head": 0}],
)  # fmt: skip
def test_what_is_said_wins(said):
    chosen = eviction(SHAPE, 64, gates=gates(**WISHES), **said)
    assert {name: getattr(chosen, name) for name in WISHES} == WISHES | said


def test_other_policies_do_not_use_the_gates():
    for policy in ("recent", "knorm", "full"):
        plain = eviction(SHAPE, 64, policy=policy)
        assert eviction(SHAPE, 64, gates=gates(**WISHES), policy=policy) == plain


def test_gates_without_wishes_change_nothing():
    assert eviction(SHAPE, 64, gates=gates()) == eviction(SHAPE, 64)
    assert eviction(SHAPE, 64, gates=GateConfig(**GATES)) == eviction(SHAPE, 64)


def test_a_wish_that_has_no_room_is_refused():
    with pytest.raises(ConfigError, match=r"sinks \+ window is 4 \+ 8, more than the budget of 6"):
        eviction(SHAPE, 6, gates=gates(**WISHES))


def test_a_budget_below_the_smallest_sound_one_warns_once(caplog):
    caplog.set_level(logging.WARNING, "mlx_kvret")
    for budget in (16, 16, 32, 48):
        eviction(SHAPE, budget, gates=gates(smallest_budget=32, sinks=3))
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "a budget of 16 tokens per head is below 32, the smallest at which these gates were found sound"
    ]
    caplog.clear()
    eviction(SHAPE, 16, gates=gates(smallest_budget=32, sinks=3), policy="recent")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sinks", -1), ("sinks", 1.5), ("window", True), ("min_per_head", "2"), ("smallest_budget", 0),
        ("smallest_budget", 2**31),
        ("scope", "token"), ("threshold", 0), ("threshold", 2), ("threshold", "x"),
    ],
)  # fmt: skip
def test_wishes_of_gates_are_checked_like_options(name, value):
    with pytest.raises(ConfigError, match=f"the gates' {name} is {value!r}"):
        EvictionDefaults(**{name: value})
    with pytest.raises(ConfigError, match=f"the gates' {name}"):
        GateConfig.from_dict(GATES | {"eviction": {name: value}})


@pytest.mark.parametrize("wishes", [[4], "sinks", 4, {"sinks": 4, "buffer": 3}])
def test_wishes_in_another_form(wishes):
    with pytest.raises(ConfigError, match=r"gates' eviction defaults (is|has)"):
        GateConfig.from_dict(GATES | {"eviction": wishes})
    with pytest.raises(ConfigError, match="gate eviction is"):
        GateConfig(**GATES, eviction=wishes)


def test_wishes_survive_and_gates_without_any_read_as_before():
    gates = GateConfig(**GATES, eviction=EvictionDefaults(**WISHES, smallest_budget=64))
    assert gates.to_dict()["eviction"] == WISHES | {"smallest_budget": 64}
    assert GateConfig.from_dict(json.loads(json.dumps(gates.to_dict()))) == gates
    assert "eviction" not in GateConfig(**GATES).to_dict()
    assert GateConfig.from_dict(GATES | {"eviction": None}).eviction is None
