"""The shared gate checkpoint: written whole, and read only if every part of it is right."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_kvret import converters
from mlx_kvret.core.checkpoint import (
    CONFIG_FILE,
    TENSOR_FILE,
    GateCheckpoint,
    load_gates,
    manifest,
    save_gates,
)
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.tensors import Tensor, read_tensors, write_tensors
from mlx_kvret.errors import CheckpointError, ModelMismatchError

MODEL = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 2,
    "intermediate_size": 20,
    "rope_theta": 10000.0,
}


def gate_config(kind="rg10", shared=True):
    return GateConfig(
        kind, 2, 3, 12, 4, "gelu", 10.5, shared, 64, base_model="org/é", base_fingerprint=fingerprint(MODEL)
    )


def weights(config, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.tensor_shapes().items()}


@pytest.fixture
def saved(tmp_path):
    save_gates(tmp_path / "gates", gate_config(), weights(gate_config()), {"from": "a test"})
    return tmp_path / "gates"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_round_trip(tmp_path, kind, shared):
    config = gate_config(kind, shared)
    tensors = {
        n: Tensor.of(w, ("F32", "BF16", "F16")[i % 3]) for i, (n, w) in enumerate(weights(config).items())
    }
    save_gates(tmp_path / "gates", config, tensors, {"steps": 100})
    found = load_gates(tmp_path / "gates")
    assert (found.config, found.provenance) == (config, {"steps": 100})
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].bits.tobytes() == tensor.bits.tobytes()


def test_layout_on_disk(saved):
    """What any program without this library finds there."""
    assert {path.name for path in saved.iterdir()} == {"kvret.json", "gates.safetensors"}
    manifest = json.loads((saved / "kvret.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("kvret-gates", 1)
    assert manifest["gates"] == gate_config().to_dict()
    tensors = load_file(saved / "gates.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {
        **{f"layers.{i}.linear1.weight": (4, 12) for i in (0, 1)},
        **{f"layers.{i}.linear1.bias": (4,) for i in (0, 1)},
        **{f"layers.{i}.linear2.weight": (4, 4) for i in (0, 1)},
        **{f"layers.{i}.linear2.bias": (4,) for i in (0, 1)},
        "shared.linear3.weight": (3, 4),
        "shared.bias": (3,),
    }
    np.testing.assert_array_equal(
        tensors["layers.1.linear2.weight"], weights(gate_config())["layers.1.linear2.weight"]
    )


def test_layout_of_untied_rg():
    assert gate_config("rg", shared=False).tensor_shapes() == {
        f"layers.{i}.{name}": shape
        for i in (0, 1)
        for name, shape in {
            "linear1.weight": (4, 12),
            "linear1.bias": (4,),
            "linear2.weight": (3, 4),
            "bias": (3,),
        }.items()
    }


def test_readme_shows_a_whole_manifest():
    readme = (Path(converters.__file__).parent / "README.md").read_text(encoding="utf-8")
    shown = json.loads(re.search(r"```json\n(.*?)```", readme, re.DOTALL)[1])
    assert shown == manifest(GateConfig.from_dict(shown["gates"]), {})


@pytest.mark.parametrize("shared", [True, False])
def test_weights_of_one_layer(shared):
    config = gate_config(shared=shared)
    raw = weights(config)
    gates = GateCheckpoint(config, {name: Tensor.of(w) for name, w in raw.items()})
    layer = gates.layer(1)
    assert set(layer) == {
        "linear1.weight",
        "linear1.bias",
        "linear2.weight",
        "linear2.bias",
        "linear3.weight",
        "bias",
    }
    np.testing.assert_array_equal(layer["linear1.weight"], raw["layers.1.linear1.weight"])
    np.testing.assert_array_equal(layer["bias"], raw["shared.bias" if shared else "layers.1.bias"])


def edit(folder, **fields):
    path = folder / CONFIG_FILE
    data = json.loads(path.read_text())
    gates = fields.pop("gates", {})
    data |= fields
    if isinstance(gates, dict):
        data["gates"] = {k: v for k, v in (data["gates"] | gates).items() if v != "delete"}
    else:
        data["gates"] = gates
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": "gguf"}, "format 'gguf'; expected 'kvret-gates'"),
        ({"format": None}, "format None"),
        ({"version": 0}, "version 0; this release reads version 1"),
        ({"version": 2}, "convert the gates again or update mlx-kvret"),
        ({"version": "1"}, "version '1'"),
        ({"version": 1.0}, "version 1.0"),
        ({"version": True}, "version True"),
        ({"form": ["shared"]}, "form is .*expected a text"),
        ({"form": "mlx"}, "'mlx' form; convert them with"),
        ({"provenance": [1]}, "provenance is"),
        ({"gates": 3}, "gate configuration is a int"),
        ({"gates": {"colour": "red"}}, "unknown fields colour"),
        ({"gates": {"hidden_size": "delete"}}, "incomplete: .*hidden_size"),
        ({"gates": {"kind": "rg11"}}, "kind is 'rg11'; expected one of rg, rg10"),
        ({"gates": {"kind": ["rg"]}}, "kind is"),
        ({"gates": {"layers": 0}}, "layers is 0; expected a whole number of at least 1"),
        ({"gates": {"layers": 10**8}}, "layers is 100000000; expected .* at most"),
        ({"gates": {"kv_heads": 10**18}}, "kv_heads is 1000000000000000000; expected .* at most"),
        ({"gates": {"width": 10**10}}, "width is 10000000000; expected .* at most"),
        ({"gates": {"hidden_size": 10**400}}, "of 401 digits is beyond the range"),
        ({"gates": {"kv_heads": -1}}, "kv_heads is -1"),
        ({"gates": {"hidden_size": 12.0}}, "hidden_size is 12.0"),
        ({"gates": {"width": True}}, "width is True"),
        ({"gates": {"activation": "tanh"}}, "activation is 'tanh'; expected one of silu"),
        ({"gates": {"bias_init": "big"}}, "bias_init is 'big'; expected a finite number"),
        ({"gates": {"bias_init": float("nan")}}, "bias_init is nan"),
        ({"gates": {"shared_projection": "false"}}, "shared_projection is 'false'; expected true or false"),
        ({"gates": {"training_budget": 0}}, "training_budget is 0"),
        ({"gates": {"base_model": None}}, "base_model is None; expected a text"),
        ({"gates": {"base_fingerprint": 5}}, "base_fingerprint is 5"),
        ({"gates": {"layers": 3}}, "missing layers.2.linear1.bias, .*; copy or convert"),
        ({"gates": {"layers": 1}}, "unexpected layers.1.linear1.bias"),
        ({"gates": {"kind": "rg"}}, "missing shared.linear2.weight; unexpected layers.0.linear2.bias"),
        ({"gates": {"shared_projection": False}}, "missing layers.0.bias.*; unexpected shared.bias"),
        ({"gates": {"kv_heads": 4}}, r"shared.linear3.weight has shape \(3, 4\); expected \(4, 4\)"),
        ({"gates": {"hidden_size": 13}}, r"layers.0.linear1.weight has shape \(4, 12\); expected \(4, 13\)"),
    ],
)
def test_manifest_that_is_wrong(saved, fields, says):
    edit(saved, **fields)
    with pytest.raises(CheckpointError, match=says):
        load_gates(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "nul", '"x"', "[" * 100_000])
def test_manifest_that_is_no_object(saved, text):
    (saved / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"kvret\.json"):
        load_gates(saved)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("layers.0.linear1.bias", None, "missing layers.0.linear1.bias"),
        ("extra", Tensor.of(np.zeros(1)), "unexpected extra"),
        ("layers.0.linear1.bias", Tensor.of(np.zeros((4, 1))), r"shape \(4, 1\); expected \(4,\)"),
        ("layers.0.linear1.bias", Tensor("I32", np.zeros(4, "<i4")), "type I32; expected F32, BF16, F16"),
        ("shared.bias", Tensor.of(np.array([0, np.nan, 0])), "shared.bias holds NaN or infinity"),
        ("shared.bias", Tensor.of(np.array([0, np.nan, 0]), "BF16"), "shared.bias holds NaN or infinity"),
        ("shared.bias", Tensor.of(np.array([0, -np.inf, 0]), "F16"), "shared.bias holds NaN or infinity"),
    ],
)
def test_tensors_that_are_wrong(tmp_path, saved, name, tensor, says):
    tensors = read_tensors(saved / TENSOR_FILE) | {name: tensor}
    tensors = {n: t for n, t in tensors.items() if t is not None}
    write_tensors(saved / TENSOR_FILE, tensors)
    with pytest.raises(CheckpointError, match=says):
        load_gates(saved)
    with pytest.raises(CheckpointError, match=says):
        save_gates(tmp_path / "new", gate_config(), tensors)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_file_that_is_missing_or_a_folder(saved, file):
    (saved / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} does not exist"):
        load_gates(saved)
    (saved / file).mkdir()
    with pytest.raises(CheckpointError, match=f"cannot read .*{file}: Is a directory"):
        load_gates(saved)


def test_folder_that_is_none(tmp_path, saved):
    for folder in (tmp_path / "absent", saved / TENSOR_FILE):
        with pytest.raises(CheckpointError, match=r"is not a folder; expected one with kvret\.json"):
            load_gates(folder)


def test_a_changed_weight_is_noticed(saved):
    content = bytearray((saved / TENSOR_FILE).read_bytes())
    content[-1] ^= 1
    (saved / TENSOR_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged or was changed"):
        load_gates(saved)


def test_gates_of_others_need_no_checksum(saved):
    whole = load_gates(saved).tensors
    save_file(load_file(saved / TENSOR_FILE), saved / TENSOR_FILE)
    found = load_gates(saved).tensors
    assert all(found[name].bits.tobytes() == tensor.bits.tobytes() for name, tensor in whole.items())


def test_truncated_weights(saved):
    content = (saved / TENSOR_FILE).read_bytes()
    (saved / TENSOR_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_gates(saved)


def test_base_model_fits(saved):
    gates = load_gates(saved)
    gates.check_model(MODEL)
    gates.check_model({"model_type": "vlm", "text_config": MODEL})
    # what a quantised copy or another release of transformers says differently
    gates.check_model(MODEL | {"quantization": {"bits": 4}, "vocab_size": 3, "rope_theta": 10000})
    gates.check_model(
        {k: v for k, v in MODEL.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 1e4}}
    )
    gates.check_model({"hidden_size": 12})


@pytest.mark.parametrize("field", MODEL)
def test_another_base_model_is_refused(saved, field):
    gates = load_gates(saved)
    with pytest.raises(
        ModelMismatchError, match=rf"\(org/é\) than mine: {field} is {MODEL[field]:g}, expected 99;"
    ):
        gates.check_model(MODEL | {field: 99}, "mine")


@pytest.mark.parametrize("line", ["", "nonsense", "hidden_size=99"])
def test_hidden_size_is_checked_whatever_the_fingerprint(saved, line):
    gates = load_gates(saved)
    unknown = replace(gates, config=replace(gates.config, base_fingerprint=line))
    unknown.check_model(MODEL)
    with pytest.raises(ModelMismatchError, match="hidden_size is 12, expected 13"):
        unknown.check_model(MODEL | {"hidden_size": 13})
