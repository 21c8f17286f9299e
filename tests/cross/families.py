"""Tiny random models of every family that both transformers and mlx-lm know, and the kinds of RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LENGTH = 48
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_LATENT = {
    "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_HYBRID = ["sliding_attention", "full_attention"] * 2
_SLIDING = {"num_hidden_layers": 4, "layer_types": _HYBRID, "sliding_window": 16}
# beside SIZES; None takes an entry away
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _EXPERTS | _SLIDING | {"num_experts": 4, "num_dense_layers": 1, "global_attn_every_n_layers": 2},
    "apertus": {},
    "bitnet": {},
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.5},
    "cohere2": _SLIDING | {"tie_word_embeddings": True, "logit_scale": 0.5, "sliding_window_pattern": 2},
    "deepseek_v2": _LATENT | _ROUTED | _EXPERTS | {"routed_scaling_factor": 1.0, "topk_method": "greedy"},
    "deepseek_v3": _LATENT | _ROUTED | _EXPERTS,
    "dots1": _ROUTED | _EXPERTS,
    "ernie4_5": {},
    "ernie4_5_moe": _EXPERTS | {
        "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "exaone4": _SLIDING | {"sliding_window_pattern": "LG"},
    "exaone_moe": _SLIDING | _EXPERTS | {
        "num_experts": 4, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 1},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": _SLIDING | {"query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "gemma4_text": _SLIDING | {
        "num_kv_shared_layers": 0, "global_head_dim": 8, "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 128},
    "glm": {},
    "glm4": {},
    "glm4_moe": _ROUTED | _EXPERTS,
    "glm4_moe_lite": _LATENT | _ROUTED | _EXPERTS,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "gpt_neox": {},
    "gpt_oss": _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "rotary_dim": 8},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "iquestcoder": {},
    "jamba": {
        "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "use_mamba_kernels": False},
    "laguna": _SLIDING | _EXPERTS | {"num_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": _EXPERTS | {"num_local_experts": 2},
    "longcat_flash": _LATENT | {
        "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "moe_topk": 2,
        "zero_expert_num": 1, "num_layers": 2},
    "mellum": _SLIDING | _EXPERTS | {"num_experts": 4},
    "mimo_v2_flash": _SLIDING | _EXPERTS | {"n_routed_experts": 4},
    "minicpm3": _LATENT,
    "minimax": {"num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1,
        "ssm_state_size": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {"original_max_position_embeddings": 16},
    "phimoe": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {},
    "qwen2_moe": _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 8},
    "qwen3_moe": _EXPERTS | {"num_experts": 4},
    "qwen3_next": _EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 8,
        "full_attention_interval": 2, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": _ROUTED | _EXPERTS,
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}  # fmt: skip
_FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 5.0, 8.0]}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, own scale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
        "attention_factor": 1.5, "truncate": False},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16} | _FACTORS,
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


def stock(family: str, kind: str, folder: Path) -> PreTrainedModel:
    """A random transformers model with this kind of RoPE, wide enough for positions to matter, and saved."""
    sizes = {k: v for k, v in (SIZES | FAMILIES[family]).items() if v is not None or k.endswith("_id")}
    for key, value in FAMILIES[family].items():
        if value is None:
            sizes[key] = None
    plain = AutoConfig.for_model(family, **sizes)
    had = getattr(plain, "rope_parameters", None)
    if had is None and kind != "default":
        raise ValueError("no RoPE settings")
    config = AutoConfig.for_model(family, **sizes, **_settings(had, kind))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name and "lm_head" not in name:
            weight.mul_(4)
    model.save_pretrained(folder)
    return model


def _settings(had: dict[str, Any] | None, kind: str) -> dict[str, Any]:
    """RoPE settings of a kind; where sliding-window layers have their own, they stay plain."""
    if had is None:
        return {}
    own = {"rope_type": "default", "rope_theta": 5e4} | KINDS[kind]
    extra = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
    if "llama_4_scaling_beta" in had:
        own = extra | own
    nested = [key for key, value in had.items() if isinstance(value, dict)]
    if not nested:
        if "partial_rotary_factor" in had:
            own = {"partial_rotary_factor": had["partial_rotary_factor"]} | own
        return {"rope_parameters": own}
    local = {"rope_type": "default", "rope_theta": 500.0}
    if "partial_rotary_factor" in had[nested[0]]:
        local["partial_rotary_factor"] = had[nested[0]]["partial_rotary_factor"]
    return {"rope_parameters": {key: own if key == "full_attention" else local for key in nested}}
