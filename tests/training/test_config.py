"""Settings: what is refused, and how runs are compared."""

from itertools import pairwise

import pytest

from mlx_kvret.errors import ConfigError
from mlx_kvret.training.config import PAPER, TrainConfig, differences
from mlx_kvret.training.schedule import rate


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("kind", "rg11", "expected one of rg, rg10"),
        ("scope", "layer", "expected one of global, head"),
        ("loss", "user", "expected one of all, assistant"),
        ("dtype", "int8", "expected one of auto"),
        ("length", 1, "at least 2"),
        ("batch", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("width", 1.5, "whole number"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "expected a number"),
        ("clip", -1.0, "above 0"),
        ("capacity_weight", -0.1, "at least 0"),
        ("warmup", -1.0, "at least 0"),
        ("tighten", 1.5, "from 0 to 1"),
        ("sinks", -1, "at least 0"),
        ("budget", 16384, "nothing would ever be over the budget"),
    ],
)
def test_refuses(setting, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig(**{setting: value})
    assert setting in str(error.value)


@pytest.mark.parametrize(
    "base, expected",
    [({"hidden_act": "gelu_new"}, "gelu_pytorch_tanh"), ({"hidden_act": "relu2"}, "silu"), ({}, "silu")],
)
def test_activation(base, expected):
    assert TrainConfig().gates(1, 1, 8, base, "").activation == expected


def test_epochs_or_steps():
    assert TrainConfig().epochs == 1
    assert TrainConfig(steps=5).epochs is None
    with pytest.raises(ConfigError, match="give one of them"):
        TrainConfig(steps=5, epochs=2)


def test_refuses_sequences_longer_than_the_model():
    config = TrainConfig(length=4096)
    with pytest.raises(ConfigError, match="made for 2048"):
        config.check_model({"text_config": {"max_position_embeddings": 2048}})
    config.check_model({"max_position_embeddings": 4096})
    config.check_model({})


def test_gates_of_a_base_model():
    base = {"hidden_size": 8, "hidden_activation": "gelu_pytorch_tanh"}
    gates = TrainConfig(kind="rg", budget=7, bias=9.0).gates(3, 2, 8, base, "org/base")
    assert (gates.kind, gates.layers, gates.kv_heads, gates.hidden_size) == ("rg", 3, 2, 8)
    assert (gates.activation, gates.training_budget, gates.bias_init) == ("gelu_pytorch_tanh", 7, 9.0)
    assert (gates.base_model, gates.base_fingerprint) == ("org/base", "hidden_size=8")


def test_gates_say_what_they_were_trained_with():
    def wishes(**settings):
        eviction = TrainConfig(**settings).gates(1, 1, 8, {}, "").eviction
        return eviction and eviction.options()

    assert wishes() is None
    assert wishes(sinks=4) == {"sinks": 4}
    assert wishes(scope="head") == {"scope": "head"}


def test_differences():
    one, other = TrainConfig().to_dict(), TrainConfig(batch=8, dtype="float32").to_dict()
    assert differences(one, one) == []
    assert differences(other, one) == ["batch is 8, was 1", "dtype is 'float32', was 'auto'"]


def test_published_settings():
    paper = TrainConfig(**PAPER)
    assert (paper.bias, paper.learning_rate, paper.warmup, paper.batch, paper.width) == (
        18,
        2e-4,
        0.03,
        4,
        512,
    )
    assert all(paper.slack(progress) == 0 for progress in (0, 0.5, 1))


def test_the_room_shrinks_to_the_budget():
    config = TrainConfig(tighten=0.5)
    assert [config.slack(progress) for progress in (0, 0.25, 0.5, 1)] == [1, 0.5, 0, 0]


def test_rate_rises_then_falls():
    rates = [rate(progress / 100, 0.1, progress) for progress in range(101)]
    assert rates[5] == pytest.approx(0.5)
    assert max(rates) == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rate(0, 0, 0) == 1


def test_a_rise_of_so_many_steps_however_long_the_run():
    assert [rate(1e-6 * step, 10, step) for step in (0, 4, 9, 20)] == pytest.approx([0.05, 0.45, 0.95, 1])
    assert rate(1.0, 10, 500) == pytest.approx(0)
