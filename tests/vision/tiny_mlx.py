"""Tiny random models of mlx-vlm, prompts with pictures for them, and the two oracles of a bounded cache.

A model's own logits where everything fits; else its logits with a full cache and dense attention, masked to
exactly the entries that were kept before each pass.
"""

from __future__ import annotations

import contextlib
import sys

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.utils import get_model_and_args, update_module_configs

from mlx_kvret.mlx_backend import hooks

IMAGE, START, END, VIDEO, WORDS = 90, 91, 92, 93, 100
_LLAMA = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}  # fmt: skip
_BARE = {name: value for name, value in _LLAMA.items() if name != "vocab_size"}
_VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 84, "patch_size": 14, "num_channels": 3,
}  # fmt: skip
_CLIP = _VIT | {"model_type": "clip_vision_model", "layer_norm_eps": 1e-6}
_QWEN = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3, "out_hidden_size": 64,
    "window_size": 56,
}  # fmt: skip
_MROPE = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
_IDS = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO,
    "vision_start_token_id": START, "vision_end_token_id": END, "vocab_size": WORDS,
}  # fmt: skip
_SLIDING = {"head_dim": 16, "sliding_window": 24, "num_hidden_layers": 4}
_LLAVA = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_PIXTRAL = {
    "vision_config": _VIT | {"model_type": "pixtral"}, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "spatial_merge_size": 2,
    "text_config": _LLAMA | {"model_type": "mistral", "head_dim": 16},
}  # fmt: skip
_DEEPSEEK = {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "scoring_func": "sigmoid",
}  # fmt: skip
_LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 3, "full_attention_interval": 2,
}  # fmt: skip

CONFIGS = {
    "qwen2_vl": _IDS | _BARE | {
        "text_config": None, "rope_scaling": _MROPE,
        "vision_config": _QWEN
        | {"model_type": "qwen2_vl", "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    },
    "qwen2_5_vl": _IDS | _BARE | {
        "text_config": None, "rope_scaling": _MROPE,
        "vision_config": _QWEN | {"model_type": "qwen2_5_vl", "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": _IDS | {
        "text_config": _LLAMA | {
            "model_type": "qwen3_vl_text", "head_dim": 16,
            "rope_scaling": _MROPE | {"mrope_interleaved": True},
        },
        "vision_config": _QWEN
        | {"model_type": "qwen3_vl", "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_5": _IDS | {
        "text_config": _LLAMA | _LINEAR | {
            "model_type": "qwen3_5_text", "head_dim": 16, "num_hidden_layers": 4,
            "rope_parameters": {
                "type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000,
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": _QWEN
        | {"model_type": "qwen3_5", "num_position_embeddings": 64, "deepstack_visual_indexes": []},
    },
    "glm4v": _IDS | {
        "text_config": _LLAMA | {
            "model_type": "glm4v_text", "eos_token_id": [1], "rope_scaling": _MROPE, "pad_token_id": 0,
            "attention_bias": True, "partial_rotary_factor": 1.0,
            "rope_parameters": _MROPE | {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "vision_config": _QWEN | {
            "model_type": "glm4v_vision", "image_size": 84, "rms_norm_eps": 1e-5, "attention_bias": False,
            "hidden_act": "silu", "initializer_range": 0.02,
        },
    },
    "gemma3": _IDS | {
        "text_config": _LLAMA | _SLIDING | {
            "model_type": "gemma3_text", "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
            "rope_global_base_freq": 1e4, "rope_local_base_freq": 1e4, "mm_tokens_per_image": 36,
        },
        "vision_config": _VIT | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 36, "pad_token_id": 0, "hidden_size": 64,
    },
    "gemma4": _IDS | {
        "text_config": _LLAMA | _SLIDING | {
            "model_type": "gemma4_text", "global_head_dim": 16, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
            "num_global_key_value_heads": 2, "vocab_size_per_layer_input": WORDS,
        },
        "vision_config": _VIT | {
            "model_type": "gemma4_vision", "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16,
            "patch_size": 16,
        },
        "audio_config": None, "pad_token_id": 0,
    },
    "llava": _IDS | _LLAVA | {"text_config": _LLAMA | {"model_type": "llama"}, "vision_config": _CLIP},
    "idefics3": _IDS | {
        "text_config": _LLAMA | {"model_type": "llama"}, "scale_factor": 2,
        "vision_config": _CLIP | {"model_type": "idefics3"},
    },
    "smolvlm": _IDS | {
        "text_config": _LLAMA | {"model_type": "llama"}, "scale_factor": 2,
        "vision_config": _CLIP | {"model_type": "smolvlm_vision"},
    },
    "internvl_chat": _IDS | {
        "text_config": _LLAMA | {"model_type": "qwen2", "max_window_layers": 2, "rope_scaling": None},
        "vision_config": _VIT | {"model_type": "intern_vit_6b"}, "downsample_ratio": 0.5,
    },
    "pixtral": _IDS | _PIXTRAL,
    "mistral3": _IDS | _PIXTRAL,
    "kimi_vl": _IDS | {
        "text_config": _LLAMA | _DEEPSEEK,
        "vision_config": _VIT | {
            "model_type": "moonvit", "init_pos_emb_height": 8, "init_pos_emb_width": 8, "embed_dim": 32,
            "depth": 2, "num_heads": 2, "merge_kernel_size": [2, 2],
        },
    },
    "paligemma": _IDS | {
        "text_config": _LLAMA | {"model_type": "gemma", "head_dim": 16}, "hidden_size": 64, "pad_token_id": 0,
        "vision_config": _VIT | {"model_type": "siglip_vision_model", "projection_dim": 64},
    },
    "mllama": _IDS | {
        "text_config": _LLAMA
        | {"model_type": "mllama", "num_hidden_layers": 4, "cross_attention_layers": [1]},
        "vision_config": _VIT | {
            "model_type": "mllama", "num_global_layers": 1, "max_num_tiles": 1, "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    },
}  # fmt: skip
M_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
RIGHT = tuple(name for name in CONFIGS if name not in ("paligemma", "mllama"))


def build(name: str, seed: int = 0, config=None):
    """A random model of mlx-vlm; weights larger than usual, so that its attention is not uniform."""
    config = {"model_type": name, **(CONFIGS[name] if config is None else config)}
    mx.random.seed(seed)
    arch, _ = get_model_and_args(dict(config))[:2]
    made = arch.ModelConfig.from_dict(config)
    made = update_module_configs(made, arch, config, ["text", "vision", "perceiver", "projector", "audio"])
    model = arch.Model(made)
    model.update(tree_map(lambda w: w * 2 if w.ndim == 2 else w, model.parameters()))
    mx.eval(model.parameters())
    return model


def turn(name: str, model, seed: int, *sizes: tuple[int, int]):
    """Ids (1, T), embeddings and what goes with them, of a text with pictures of these sizes in tokens.

    Positions go with them also where a model only leaves them on itself, as in ``mlx_kvret.generate``.

    Features of the towers of Qwen's and GLM's models are the models' own; elsewhere they are random, for what
    is tested is what comes after them.
    """
    rng = np.random.default_rng(seed)
    words = lambda n: rng.integers(1, 80, n).tolist()  # noqa: E731
    ids = words(5)
    for rows, columns in sizes:
        ids += [START] + [IMAGE] * (rows * columns) + [END] + words(4)
    ids = mx.array([ids])
    if name in M_ROPE:
        grids = mx.array([[1, 2 * rows, 2 * columns] for rows, columns in sizes])
        patch = 3 * 2 * model.config.vision_config.patch_size**2
        patches = sum(4 * rows * columns for rows, columns in sizes)
        pixels = mx.array(rng.normal(size=(patches, patch)).astype(np.float32)) if sizes else None
        given = {"image_grid_thw": grids} if sizes else {}
        out = model.get_input_embeddings(ids, pixels, mask=mx.ones_like(ids), **given)
        rest = {k: v for k, v in out.to_dict().items() if k != "inputs_embeds" and v is not None}
        return ids, out.inputs_embeds, {"position_ids": model.language_model._position_ids} | given | rest
    out = model.get_input_embeddings(ids, None, mask=mx.ones_like(ids))
    noise = mx.array(rng.normal(size=out.inputs_embeds.shape).astype(np.float32)) * 0.5
    embeds = mx.where((ids == IMAGE)[..., None], noise, out.inputs_embeds)
    rest = {k: v for k, v in out.to_dict().items() if k != "inputs_embeds" and v is not None}
    return ids, embeds, rest


def passes(lm, given, cache, chunk: int = 16, before=None):
    """The last logits of every pass, made as mlx-vlm's ``generate_step`` makes them."""
    ids, embeds, rest = given
    found = []
    while ids.shape[1]:
        n = min(chunk, max(1, ids.shape[1] - 1))
        if before is not None:
            before(cache)
        out = lm(ids[:, :n], inputs_embeds=embeds[:, :n], cache=cache, **rest)
        found.append(out.logits[:, -1])
        mx.eval(found[-1])
        ids, embeds = ids[:, n:], embeds[:, n:]
    return mx.concatenate(found)


def tokens(lm, ids, cache, before=None):
    """The logits after each of these ids, read one by one."""
    found = []
    for one in ids:
        if before is not None:
            before(cache)
        found.append(lm(mx.array([[one]]), cache=cache).logits[:, -1])
        mx.eval(found[-1])
    return mx.concatenate(found)


@contextlib.contextmanager
def masked(lm, caches, kept):
    """Dense attention over what was kept: ``kept`` is by pass, by competing layer, by head."""
    namespaces = [vars(sys.modules[type(a).__call__.__module__]) for a in hooks.attention_modules(lm)]
    stocks = [(space, space[hooks.ATTENTION]) for space in namespaces]
    stock = stocks[0][1]
    competing = [i for i, c in enumerate(caches) if type(c).__name__ == "KVCache"]
    state = {"pass": -1}

    def attend(queries, keys, values, cache=None, scale=1.0, mask=None, **more):
        place = next((i for i, c in enumerate(caches) if c is cache), None)
        if place not in competing:
            return stock(queries, keys, values, cache, scale=scale, mask=mask, **more)
        heads = kept[state["pass"]][competing.index(place)]
        count, length, width = queries.shape[2], keys.shape[2], keys.shape[1]
        visible = np.zeros((width, count, length), bool)
        for head, positions in enumerate(heads):
            visible[head, :, np.asarray(positions, int)] = True
        visible[:, :, length - count :] = np.tril(np.ones((count, count), bool))
        bias = np.where(np.repeat(visible, queries.shape[1] // width, 0), 0, -np.inf).astype(np.float32)
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            bias = bias + np.array(mask)  # latent attention puts its positions there
        bias = mx.array(bias).reshape(1, *bias.shape[-3:]).astype(queries.dtype)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=bias)

    for space, _ in stocks:
        space[hooks.ATTENTION] = attend
    try:
        yield state
    finally:
        for space, function in stocks:
            space[hooks.ATTENTION] = function


def stock_cache(lm):
    """A model's own empty cache."""
    return make_prompt_cache(lm)


def apart(a, b) -> float:
    """The largest difference, as a part of the largest value."""
    return float(mx.abs(a - b).max() / mx.abs(b).max())
