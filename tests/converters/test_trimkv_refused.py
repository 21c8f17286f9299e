"""Released folders that are damaged, unsafe or contradict themselves; each refusal says what is wrong."""

import builtins
import collections
import os
import pickle

import pytest
import torch
from released import CONFIG, TEXT, WEIGHTS, config, state, write

from mlx_kvret.converters import convert, load_any
from mlx_kvret.errors import CheckpointError, MissingDependencyError

GATE = f"{TEXT}layers.1.self_attn.retention_gate."


def refused(folder, says):
    with pytest.raises(CheckpointError, match=says):
        load_any(folder)
    with pytest.raises(CheckpointError):
        convert(folder, folder.parent / "out", "shared")
    assert not (folder.parent / "out").exists()


class Attack:
    """A pickle of this runs a command when it is opened."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain 2", "plain 4"])
def test_pickle_is_never_executed(tmp_path, form, recwarn):
    folder, proof = write(tmp_path / "released", config(), state()), tmp_path / "executed"
    attack = {GATE + "bias": Attack(proof)}
    if form.startswith("plain"):
        (folder / WEIGHTS).write_bytes(pickle.dumps(attack, protocol=int(form[-1])))
    else:
        torch.save(attack, folder / WEIGHTS, _use_new_zipfile_serialization=form == "zip")
    refused(folder, "not a whole torch file" if form == "plain 4" else "asks for posix.mkdir, expected plain")
    assert not proof.exists() and not recwarn.list
    with pytest.raises(CheckpointError) as error:
        load_any(folder)
    # torch's own text tells how to run the attack
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
def test_truncated_torch_file(tmp_path, keep):
    folder = write(tmp_path / "released", config(), state())
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(folder, "not a whole torch file")


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_no_torch_file(tmp_path, content):
    folder = write(tmp_path / "released", config(), state())
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "download it again")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(3)], "holds a list; expected a state dict"),
        ({}, "is empty"),
        ({3: torch.zeros(3)}, "the key 3"),
        ({"a": 3}, "a is int; expected a dense tensor"),
        ({"a": torch.zeros(3, dtype=torch.int64)}, "a is torch.int64"),
        ({"a": torch.zeros(3, dtype=torch.float64)}, "a is torch.float64"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "a is torch.float32; expected a dense"),
        ({"a": torch.zeros(3, device="meta")}, "a is torch.float32; expected a dense"),
        ({"a": torch.zeros(1).expand(10**12)}, "claims more values"),
        (
            collections.OrderedDict(state() | {"lm_head.weight": torch.zeros(3)}),
            "no part of a retention gate: lm_head",
        ),
        (state() | {GATE + "linear9.weight": torch.zeros(3)}, "no part of a retention gate"),
        (state() | {f"{TEXT}layers.01.self_attn.retention_gate.bias": torch.zeros(2)}, "no part of"),
        (state() | state(prefix="other."), "several models: model., other"),
    ],
)
def test_not_the_tensors_of_gates(tmp_path, content, says):
    refused(write(tmp_path / "released", config(), content), says)


@pytest.mark.parametrize("name", ["bias", "linear1.weight", "linear2.bias", "linear3.weight"])
def test_missing_tensor(tmp_path, name):
    gates = state()
    del gates[GATE + name]
    refused(write(tmp_path / "released", config(), gates), f"layer 1 has .*{name}")


def test_missing_layer(tmp_path):
    refused(write(tmp_path / "released", config(), state(layers=(0, 2))), "missing for layers 1 of 3")
    refused(
        write(tmp_path / "released", config(), state(layers=range(4))), "layer 3, config.json has 3 layers"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(tmp_path, value, dtype):
    gates = state(dtype=dtype)
    gates[GATE + "linear1.weight"][3, 5] = value
    refused(write(tmp_path / "released", config(), gates), "linear1.weight holds NaN or infinity")


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("linear1.weight", (32, 63), r"shape \(32, 63\); expected \(32, 64\)"),
        ("linear1.bias", (1, 32), r"shape \(1, 32\); expected \(32,\)"),
        ("linear2.weight", (32, 32, 1), "expected"),
        ("bias", (), r"shape \(\); expected \(2,\)"),
    ],
)
def test_wrong_shape(tmp_path, name, shape, says):
    refused(
        write(tmp_path / "released", config(tied=False), state() | {GATE + name: torch.zeros(shape)}), says
    )


def test_first_layer_without_two_dimensions(tmp_path):
    gates = state() | {f"{TEXT}layers.0.self_attn.retention_gate.linear1.weight": torch.zeros(3)}
    refused(write(tmp_path / "released", config(), gates), "expected \\(h, hidden\\)")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"retention_gate": "rg"}, "retention_gate is 'rg' in config.json, 'rg10' in the tensors"),
        ({"hidden_size": 65}, "hidden_size is 65 in config.json, 64 in the tensors"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"retention_gate_intermediate_size": 512}, "retention_gate_intermediate_size is 512"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"retention_gate_bias_init": "high"}, "bias_init is 'high'"),
        ({"retention_gate_bias_init": float("nan")}, "bias_init is nan"),
    ],
)
def test_config_of_other_gates(tmp_path, more, says):
    refused(write(tmp_path / "released", config(**more), state()), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ("[1]", "holds a list"), ("\xff", "not valid JSON"), ("[" * 100_000, "JSON")],
)
def test_broken_config(tmp_path, text, says):
    folder = write(tmp_path / "released", config(), state())
    (folder / CONFIG).write_bytes(text.encode("latin1"))
    refused(folder, says)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(tmp_path, name):
    folder = write(tmp_path / "released", config(), state())
    (folder / name).unlink()
    refused(folder, "does not exist" if name == CONFIG else "holds no retention gates")


def test_reading_needs_no_torch_and_writing_says_that_it_does(tmp_path, monkeypatch):
    def refuses_torch(name, *args):
        if name == "torch":
            raise ImportError(name)
        return genuine(name, *args)

    folder, genuine = write(tmp_path / "released", config(), state()), builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuses_torch)
    assert load_any(folder).config.layers == 3
    assert convert(folder, tmp_path / "shared", "shared").tensors == 14
    with pytest.raises(MissingDependencyError, match="pip install torch"):
        convert(folder, tmp_path / "again", "trimkv")
    assert not (tmp_path / "again").exists()
