"""Tiny random models of six architectures."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
)

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "llama": lambda: LlamaConfig(**SMALL),
    "phi3": lambda: Phi3Config(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    # convolutions
    "lfm2": lambda: Lfm2Config(
        **SMALL, layer_types=["conv", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    # attention sinks and experts
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


def tiny_model(name, dtype=torch.float32):
    """Random weights, large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.to(dtype).eval()
