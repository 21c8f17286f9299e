"""The demo model (Qwen3, 161k parameters): configuration, initialisation and forward pass."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlx_kvret.demo.language import BOS, END, WORDS

CONFIG = Qwen3Config(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=len(WORDS),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    bos_token_id=BOS,
    eos_token_id=END,
    dtype="float32",
)


def new_model() -> Qwen3ForCausalLM:
    """Random weights, but for two hints without which training stays on a plateau for very long.

    A model of this size at first learns to guess "some value of this text" and sits there. What ended it,
    together with a high learning rate: two heads of layer 0 that look 1 and 2 tokens back from the
    start (the distance of a value from its name and its mark), and sharper attention, by q/k norms of 1.6.
    """
    model = Qwen3ForCausalLM(CONFIG)
    width, layers = CONFIG.hidden_size, CONFIG.num_hidden_layers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=width**-0.5 / (2 if "embed" in name else 1))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight /= (2 * layers) ** 0.5
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(1.6)
        _look_back(model)
    return model


def _look_back(model: Qwen3ForCausalLM) -> None:
    """Let query heads 0 and 1 of layer 0 attend 1 and 2 tokens back."""
    # a constant in every embedding gives q and k a part that does not depend on the word; turned against
    # each other by RoPE's angle for the distance, these parts match best at that distance
    model.model.embed_tokens.weight[:, 0] = 0.25
    attention, size = model.model.layers[0].self_attn, CONFIG.head_dim
    angles = 1e6 ** (-torch.arange(0, size, 2) / size)
    for pair, strength in enumerate((1.5, 1.5, 0.9, 0.6)):
        attention.k_proj.weight[pair, 0] = strength
        for head, distance in enumerate((1, 2)):
            turn, row = -distance * angles[pair], head * size + pair
            attention.q_proj.weight[row, 0] = strength * torch.cos(turn)
            attention.q_proj.weight[row + size // 2, 0] = strength * torch.sin(turn)


def logits(model: Qwen3ForCausalLM, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, words) of ``ids`` (B, T) at positions (B, T) that may skip ahead.

    The stock model takes a skip for the beginning of another document.
    """
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, position)
    for layer in model.model.layers:
        x = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attn(x, position_embeddings=rotary, attention_mask=None)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))
