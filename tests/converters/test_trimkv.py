"""Released gates to the shared checkpoint and back."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from released import DTYPES, HIDDEN, LAYERS, TEXT, VISION, assert_same_bits, config, read, state, write

from mlx_kvret.converters import FORMS, convert, load_any, trimkv
from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.errors import ConfigError, ModelMismatchError
from mlx_kvret.mlx_backend.gates import from_checkpoint


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tied", "says"), [(True, True), (False, False), (False, True), (True, False)])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_round_trip_is_bit_equal(tmp_path, kind, tied, says, dtype, vision):
    released = config(kind, says, vision), state(kind, tied, dtype, VISION if vision else TEXT)
    convert(write(tmp_path / "released", *released), tmp_path / "shared", "shared")
    convert(tmp_path / "shared", tmp_path / "again", "trimkv")

    assert load_gates(tmp_path / "shared").config.shared_projection == (tied and says)
    found_config, found_state = read(tmp_path / "again")
    assert found_config == released[0]
    assert_same_bits(found_state, released[1])


def test_mixed_types_special_values_and_views_survive(tmp_path):
    gates = state()
    first = f"{TEXT}layers.0.self_attn.retention_gate."
    gates[first + "linear1.weight"] = torch.randn(HIDDEN, 32).half().T
    gates[first + "linear1.bias"][:4] = torch.tensor([-0.0, 1e-45, 3.4e38, -1e-38])
    gates[first + "linear2.bias"] = torch.nn.Parameter(gates[first + "linear2.bias"])
    convert(write(tmp_path / "released", config(), gates), tmp_path / "shared", "shared")
    convert(tmp_path / "shared", tmp_path / "again", "trimkv")
    assert_same_bits(read(tmp_path / "again")[1], {n: t.detach().contiguous() for n, t in gates.items()})


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("tied", [True, False])
def test_gates_compute_what_the_released_file_says(tmp_path, kind, tied):
    """In torch as the papers' gate is defined, in MLX after the conversion."""
    gates = state(kind, tied)
    ours = from_checkpoint(load_any(write(tmp_path / "released", config(kind, tied), gates)))
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer in range(LAYERS):
        own = {name: gates[f"{TEXT}layers.{layer}.self_attn.retention_gate.{name}"] for name in NAMES[kind]}
        h = torch.nn.functional.silu(x @ own["linear1.weight"].T + own["linear1.bias"])
        if kind == "rg10":
            h = torch.nn.functional.silu(h @ own["linear2.weight"].T + own["linear2.bias"])
        logit = h @ own["linear2.weight" if kind == "rg" else "linear3.weight"].T + own["bias"]
        expected = torch.nn.functional.logsigmoid(logit)
        np.testing.assert_allclose(ours.log_beta(layer, mx.array(x.numpy())), expected, rtol=1e-4, atol=1e-9)


NAMES = {
    "rg": ["linear1.weight", "linear1.bias", "linear2.weight", "bias"],
    "rg10": ["linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "linear3.weight", "bias"],
}


def test_configuration_joins_both_files(tmp_path):
    gates = load_any(write(tmp_path / "released", config(vision=True), state(prefix=VISION))).config
    assert (gates.kind, gates.layers, gates.kv_heads, gates.hidden_size, gates.width) == (
        "rg10",
        3,
        2,
        64,
        32,
    )
    assert (gates.training_budget, gates.bias_init, gates.base_model) == (128, 18.0, "org/base-é")
    assert "hidden_size=64" in gates.base_fingerprint and "rope_theta=1e+06" in gates.base_fingerprint


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_act", "gelu_new", {"activation": "gelu_pytorch_tanh"}),
        ("memory_size", 0.25, {"training_budget": None}),
        ("memory_size", 0, {"training_budget": None}),
        ("memory_size", float("inf"), {"training_budget": None}),
        ("retention_gate_bias_init", 10, {"bias_init": 10.0}),
    ],
)
def test_fields_of_the_config(field, value, expected):
    gates = trimkv.from_state(config(**{field: value}), _tensors(state())).config.to_dict()
    assert gates | expected == gates


def test_config_without_gate_fields_is_enough():
    bare = {name: value for name, value in config().items() if name in ("model_type", "hidden_size")}
    gates = trimkv.from_state(bare, _tensors(state())).config
    assert (gates.kind, gates.shared_projection, gates.bias_init) == ("rg10", True, 18.0)


def test_falsely_tied_is_told(tmp_path):
    def notes(kind, tied):
        source = write(tmp_path / f"{kind}{tied}", config(kind, True), state(kind, tied))
        return convert(source, tmp_path / f"{kind}{tied}.shared", "shared").notes

    assert notes("rg10", False) == (trimkv.FALSELY_TIED,)
    # rg gates were never tied: nothing to tell
    assert notes("rg10", True) == notes("rg", False) == ()


def test_tied_tensors_are_stored_once(tmp_path):
    done = convert(write(tmp_path / "released", config(), state()), tmp_path / "shared", "shared")
    assert done.tensors == LAYERS * 4 + 2
    assert {"shared.linear3.weight", "shared.bias"} < load_gates(tmp_path / "shared").tensors.keys()


def test_only_attention_layers_have_gates(tmp_path):
    kinds = {
        "num_hidden_layers": 5,
        "layer_types": ["linear_attention", "full_attention"] * 2 + ["full_attention"],
    }
    released = config(**kinds), state(layers=(4, 1, 3))
    convert(write(tmp_path / "released", *released), tmp_path / "shared", "shared")
    convert(tmp_path / "shared", tmp_path / "again", "trimkv")
    shared = load_gates(tmp_path / "shared")
    assert shared.config.layers == 3
    for index, layer in enumerate((1, 3, 4)):
        theirs = released[1][f"{TEXT}layers.{layer}.self_attn.retention_gate.linear1.bias"]
        np.testing.assert_array_equal(shared.layer(index)["linear1.bias"], theirs)
    assert_same_bits(read(tmp_path / "again")[1], released[1])


def base(tmp_path, **more):
    """A base model's folder: its config has no gate fields."""
    gate = ("retention_gate", "tie_", "memory_size", "global_capacity", "base_model")
    plain = {name: value for name, value in config(**more).items() if not name.startswith(gate)}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(plain))
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("tied", [True, False])
def test_gates_that_never_were_trimkv_take_the_models_config(tmp_path, kind, tied):
    native = dataclasses.replace(
        load_any(write(tmp_path / "r", config(kind, tied), state(kind, tied))), provenance={}
    )
    with pytest.raises(ConfigError, match="give the base model's folder"):
        trimkv.save_trimkv(tmp_path / "out", native)
    folder = base(tmp_path, kind=kind)
    trimkv.save_trimkv(tmp_path / "out", native, json.loads((folder / "config.json").read_text()))
    assert_same_bits(read(tmp_path / "out")[1], state(kind, tied))
    again = load_any(tmp_path / "out")
    assert again.config == native.config


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hidden_size": 128}, "hidden_size is 64, expected 128"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 3, expected 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2, expected 4"),
        ({"rope_theta": 10000}, "rope_theta is 1e\\+06, expected 10000"),
    ],
)
@pytest.mark.parametrize("to", FORMS)
def test_gates_of_another_model_are_refused(tmp_path, wrong, says, to):
    source = write(tmp_path / "released", config(), state())
    with pytest.raises(ModelMismatchError, match=says):
        convert(source, tmp_path / "out", to, model=base(tmp_path, **wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_size": 128}, {"num_hidden_layers": 4}, {"num_key_value_heads": 4}, {"hidden_act": "relu"}],
)
def test_so_they_are_without_a_fingerprint(wrong):
    native = trimkv.from_state(config(), _tensors(state()))
    native = dataclasses.replace(
        native, config=dataclasses.replace(native.config, base_fingerprint=""), provenance={}
    )
    with pytest.raises((ConfigError, ModelMismatchError)):
        trimkv.to_state(native, config(**wrong))


@pytest.mark.parametrize(
    ("provenance", "says"),
    [
        ({}, "needs the base model's config"),
        ({"trimkv": {"config": []}}, "needs the base model's config"),
        ({"trimkv": {"config": config(hidden_size=128)}}, "hidden_size is 128"),
        ({"trimkv": {"config": config(kind="rg")}}, "retention_gate is 'rg'"),
        ({"trimkv": {"config": config(), "layers": [0, 1]}}, "expected 3 layer numbers"),
        ({"trimkv": {"config": config(), "layers": [0, 0, 1]}}, "gates are missing for layers 2"),
        ({"trimkv": {"config": config(), "prefix": "oops"}}, "no part of a retention gate"),
    ],
)
def test_damaged_provenance_is_refused(provenance, says):
    gates = dataclasses.replace(trimkv.from_state(config(), _tensors(state())), provenance=provenance)
    with pytest.raises(ConfigError, match=says):
        trimkv.to_state(gates)


def _tensors(weights):
    from mlx_kvret.core.tensors import Tensor

    return {name: Tensor.of(t.numpy()) for name, t in weights.items()}
