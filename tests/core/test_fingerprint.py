"""One base model, written down in the ways that its copies have; and other models."""

import itertools
import json

import pytest
from transformers import Gemma3Config, LlamaConfig, Qwen3Config

from mlx_kvret.core.fingerprint import differences, fingerprint, text_config

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936,
}  # fmt: skip
ROPE = {"rope_theta": 1000000, "rope_scaling": None}
NESTED_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}

LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}

# as released: the class knows that heads are 16, KV heads 8, head_dim 256 and theta 1e6
GEMMA3 = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "sliding_window": 1024}
GEMMA3_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
GEMMA3_ROPE = {"full_attention": {"rope_theta": 1e6, "factor": 8.0}, "sliding_attention": {"rope_theta": 1e4}}

COPIES = {
    "qwen3": [
        QWEN3 | ROPE,
        QWEN3 | NESTED_ROPE,
        QWEN3 | ROPE | NESTED_ROPE,
        QWEN3 | ROPE | {"rope_parameters": None, "text_config": None},
        QWEN3 | ROPE | {"quantization": {"group_size": 64, "bits": 4}, "vocab_size": 152064},
        {
            "model_type": "qwen3_vl",
            "text_config": QWEN3 | NESTED_ROPE,
            "vision_config": {"hidden_size": 1152},
        },
    ],
    "llama with as many KV heads as heads": [
        LLAMA,
        LLAMA | {"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 10000.0},
        LLAMA | {"num_key_value_heads": None, "head_dim": None},
    ],
    "gemma3": [
        {"model_type": "gemma3", "text_config": GEMMA3},
        {"model_type": "gemma3", "text_config": GEMMA3 | GEMMA3_HEADS | {"rope_parameters": GEMMA3_ROPE}},
        GEMMA3 | GEMMA3_HEADS | {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
        GEMMA3 | {"num_attention_heads": 16},
    ],
}


@pytest.mark.parametrize("model", COPIES)
def test_copies_are_recognised(model):
    lines = [fingerprint(config) for config in COPIES[model]]
    for one, other in itertools.permutations(lines, 2):
        assert differences(one, other) == []


def test_models_of_different_families_are_told_apart():
    for one, other in itertools.permutations(COPIES, 2):
        for config, stranger in itertools.product(COPIES[one], COPIES[other]):
            assert differences(fingerprint(config), fingerprint(stranger))


def test_line_is_readable():
    assert fingerprint(QWEN3 | NESTED_ROPE) == (
        "hidden_size=2560 num_hidden_layers=36 num_attention_heads=32 num_key_value_heads=8 head_dim=128 "
        "intermediate_size=9728 rope_theta=1e+06"
    )
    assert fingerprint({}) == ""


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim"])
def test_each_difference_is_named(field):
    other = fingerprint(QWEN3 | {field: 4})
    assert differences(other, fingerprint(QWEN3)) == [f"{field} is 4, expected {QWEN3[field]}"]


def test_rope_theta_tells_models_apart_wherever_it_stands():
    longer = fingerprint(QWEN3 | {"rope_parameters": {"rope_theta": 5e6}})
    assert differences(longer, fingerprint(QWEN3 | ROPE)) == ["rope_theta is 5e+06, expected 1e+06"]
    local = {"text_config": GEMMA3 | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}}
    assert differences(fingerprint(local), fingerprint(COPIES["gemma3"][1])) == [
        "rope_theta is 10000, expected 1e+06"
    ]


@pytest.mark.parametrize("rope", [[], "default", 7, {"full_attention": None}, {"full_attention": 3}])
def test_strange_rope_parameters_do_not_count(rope):
    assert fingerprint(QWEN3 | {"rope_parameters": rope}) == fingerprint(QWEN3)
    assert fingerprint(QWEN3 | ROPE | {"rope_parameters": rope}) == fingerprint(QWEN3 | ROPE)


@pytest.mark.parametrize("damaged", ["", "=", "nonsense = 3", "a=b=c"])
def test_a_line_without_fields_says_nothing(damaged):
    assert differences(damaged, fingerprint(QWEN3)) == differences(fingerprint(QWEN3), damaged) == []


@pytest.mark.parametrize("cls", [LlamaConfig, Qwen3Config, Gemma3Config])
def test_what_transformers_saves_is_what_it_holds(cls, tmp_path):
    config = cls()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert fingerprint(saved) and fingerprint(saved) == fingerprint(config.to_dict())
    # the classic form, with theta at the top
    text = text_config(saved)
    rope = text.pop("rope_parameters")
    theta = rope.get("full_attention", rope)["rope_theta"]
    assert fingerprint(text | {"rope_theta": theta}) == fingerprint(config.to_dict())
