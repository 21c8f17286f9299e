"""Tiny random models of many architectures, and random gates for them."""

import importlib

import mlx.core as mx
import numpy as np

import mlx_kvret
from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.mlx_backend import hooks

VOCAB = 64
COMMON = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
SLIDING = {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 2}
OWN = {
    "qwen3": {},
    "llama": {},
    "phi3": {},
    "qwen2": {},
    "ministral3": {"rope_parameters": {
        "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}},
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 8},
    "deepseek_v3": {
        "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
        "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1},
    "mistral4": {
        "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
        "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0, "norm_topk_prob": True, "topk_group": 1, "n_group": 1,
        "first_k_dense_replace": 1,
        "rope_parameters": {
            "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16,
            "type": "default"}},
    "gpt_oss": {
        "num_hidden_layers": 4, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": SLIDING | {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4},
    # a hybrid: linear attention in every layer but the last of each two
    "qwen3_next": {
        "num_hidden_layers": 4, "full_attention_interval": 2, "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 3, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16, "mlp_only_layers": [], "moe_intermediate_size": 16,
        "partial_rotary_factor": 0.5},
    # a hybrid whose layers each keep a state and a KV cache in one list
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 3},
}  # fmt: skip
ARCHITECTURES = tuple(OWN)


def tiny(name="qwen3", seed=0, **changes):
    """A model of mlx-lm's file ``name`` with random float32 weights."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    args = module.ModelArgs.from_dict({"model_type": name} | COMMON | OWN.get(name, {}) | changes)
    model = module.Model(args)
    model.eval()
    mx.eval(model.parameters())
    return model


def shape_of(model):
    """What the bounded layers of an attached model cache."""
    return hooks.attachment(model).layout.shape


def random_gates(shape, seed=0, kind="rg10", shared=True, bias=(1.0, 7.0), scale=1.0, layers=None):
    """A gate checkpoint whose log β spreads over orders of magnitude within and between heads."""
    config = GateConfig(
        kind, layers or shape.layers, shape.kv_heads, shape.hidden_size, width=8, shared_projection=shared
    )
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor, size in config.tensor_shapes().items():
        values = rng.normal(0, scale, size)
        if tensor.endswith("bias") and "linear" not in tensor:
            values = rng.uniform(*bias, size)
        elif len(size) == 2:
            values *= 2 / np.sqrt(size[1])
        tensors[tensor] = Tensor.of(values.astype(np.float32))
    return GateCheckpoint(config, tensors)


def gated(name="qwen3", seed=0, gates=None, **changes):
    """An attached tiny model with random gates; ``gates`` are options of :func:`random_gates`."""
    model = mlx_kvret.attach(tiny(name, seed, **changes))
    return mlx_kvret.attach(model, random_gates(shape_of(model), seed, **(gates or {})))


def prompt(length, seed=0):
    """Random token ids."""
    return np.random.default_rng(seed).integers(VOCAB, size=length).tolist()


def pieces(tokens, sizes):
    """A prompt cut into chunks; the last size repeats."""
    sizes, chunks = list(sizes), []
    while tokens:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        chunks.append(tokens[:size])
        tokens = tokens[size:]
    return chunks


def forward(model, tokens, cache):
    """Logits (T, vocab) of one forward pass, as numpy."""
    return np.array(model(mx.array([tokens]), cache=cache)[0].astype(mx.float32))
