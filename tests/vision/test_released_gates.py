"""Gates released for Qwen3-VL, under its language model's prefix: read, attached and found by name."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

import mlx_kvret
from mlx_kvret.converters import convert, load_any
from mlx_kvret.errors import ModelMismatchError
from mlx_kvret.zoo import auto
from mlx_kvret.zoo.identity import Subject

from . import folders

PREFIX, WIDTH, HIDDEN, HEADS, LAYERS = "model.language_model.", 32, 64, 2, 2
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "recall Anna"}]}]


def state(prefix=PREFIX):
    """rg10, one last projection for all layers."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=random) * 0.3

    tied = {"linear3.weight": normal(HEADS, WIDTH), "bias": normal(HEADS) + 4}
    found = {}
    for layer in range(LAYERS):
        own = {"linear1.weight": normal(WIDTH, HIDDEN), "linear1.bias": normal(WIDTH)}
        own |= {"linear2.weight": normal(WIDTH, WIDTH), "linear2.bias": normal(WIDTH)} | tied
        found |= {f"{prefix}layers.{layer}.self_attn.retention_gate.{n}": t for n, t in own.items()}
    return found


def write(path, folder, **changed):
    """A released folder for the model in ``folder``: a config of transformers 4 with gate fields."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    text |= {"retention_gate": "rg10", "retention_gate_intermediate_size": WIDTH}
    text |= {"retention_gate_bias_init": 18.0, "tie_retention_gate_layers": True} | changed
    config |= {"memory_size": 32, "global_capacity": True, "base_model": "Qwen/Qwen3-VL-4B-Instruct"}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    torch.save(state(), path / "trimkv_weights.pth")
    return path


@pytest.fixture(scope="module")
def released(folder, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gates") / "released", folder)


def talk(model, processor):
    cache = mlx_kvret.make_cache(model, budget=8, buffer=2)
    said = mlx_kvret.stream_generate(
        model, processor, QUESTION, images=[folders.picture(1)], cache=cache, max_tokens=4
    )
    tokens = [one.token for one in said]
    assert cache.entries < cache.seen * LAYERS * HEADS
    return tokens, [[head.tolist() for head in layer] for layer in cache.kept_positions()]


def test_both_backends_take_them_and_keep_the_same(folder, released):
    found = {}
    for backend in ("torch", "mlx"):
        whole = mlx_kvret.load(folder, released, backend=backend)
        bare = mlx_kvret.load(folder, None, backend=backend)
        mlx_kvret.detach(bare[0])
        mlx_kvret.attach(bare[0], released)
        found[backend] = talk(*whole)
        assert talk(*bare) == found[backend]
    assert found["torch"] == found["mlx"]


@pytest.mark.parametrize("form", ["shared", "mlx", "torch"])
def test_they_are_converted_and_come_back(folder, released, tmp_path, form):
    convert(released, tmp_path / "there", form, model=folder)
    convert(tmp_path / "there", tmp_path / "back", "trimkv", model=folder)
    found = torch.load(tmp_path / "back" / "trimkv_weights.pth", weights_only=True)
    assert found.keys() == state().keys()
    for name, tensor in state().items():
        np.testing.assert_array_equal(found[name], tensor)
    assert load_any(tmp_path / "back").config.base_fingerprint == load_any(released).config.base_fingerprint


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_those_of_another_base_are_refused(folder, tmp_path, backend):
    other = write(tmp_path / "other", folder, rope_theta=5e6)
    with pytest.raises(ModelMismatchError, match="rope_theta"):
        mlx_kvret.load(folder, other, backend=backend)


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("Qwen/Qwen3-VL-4B-Instruct", "ngocbh/DBTrimKV-Qwen3-VL-4B-Instruct"),
        ("mlx-community/Qwen3-VL-4B-Instruct-4bit", "ngocbh/DBTrimKV-Qwen3-VL-4B-Instruct"),
        ("Qwen/Qwen3-VL-8B-Thinking", "ngocbh/DBTrimKV-Qwen3-VL-8B-Thinking"),
        ("Qwen/Qwen3-4B-Instruct-2507", "ngocbh/DBTrimKV-Qwen3-4B-Instruct-2507"),
    ],
)
def test_a_base_and_its_copies_have_theirs(name, gates):
    """Qwen3-VL-4B and Qwen3-4B-Instruct-2507 have one shape: their names tell them apart."""
    sure = [match for match in auto.matches(Subject(published("8B" in name), [name])) if match.sure]
    assert sure[0].entry.gates == gates
    assert {match.entry.base.name.rpartition("/")[2] for match in sure} == {gates.split("KV-")[1]}


def test_a_nameless_copy_is_told_of_all_it_may_be(caplog):
    with caplog.at_level(logging.WARNING, "mlx_kvret"):
        assert auto.choose(Subject(published(False), ["somewhere/else"])) is None
    assert "ngocbh/DBTrimKV-Qwen3-VL-4B-Instruct" in caplog.text


def published(large):
    """config.json of Qwen3-VL-4B-Instruct or 8B-Thinking, as far as shapes go."""
    sizes = (4096, 12288) if large else (2560, 9728)
    text = {
        "model_type": "qwen3_vl_text", "hidden_size": sizes[0], "intermediate_size": sizes[1],
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rope_theta": 5000000, "vocab_size": 151936,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    }  # fmt: skip
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": {"hidden_size": 1152}}
