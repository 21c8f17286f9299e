"""Models saved by transformers 5 nest their RoPE settings; mlx-lm must run them with the same."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mlx_kvret

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


PLAIN = {"rope_type": "default"}
FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")


@pytest.mark.parametrize("family,scaling", [*((name, PLAIN) for name in FAMILIES), ("llama", LLAMA3)])
def test_the_same_positions(tmp_path, family, scaling):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        rope_parameters={"rope_theta": 5e5, **scaling},
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = mlx_kvret.load(tmp_path, backend="mlx")
    assert tokenizer is None
    ids = np.random.default_rng(0).integers(3, 96, (1, 200))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(ours(mx.array(ids))), expected, atol=2e-5)
