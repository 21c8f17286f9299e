"""Tiny random vision-language models of transformers, and pictures as their processors would give them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

IMAGE, START, END, VIDEO, WORDS = 90, 91, 92, 93, 100
TEXT: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 84, "patch_size": 14,
}  # fmt: skip
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
    "vision_end_token_id": END,
}  # fmt: skip
QWEN = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
    "spatial_merge_size": 2, "out_hidden_size": 64,
}  # fmt: skip
WINDOWS = {
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": TOKENS
    | {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    },
    "qwen2_5_vl": TOKENS
    | {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": QWEN | {"window_size": 56, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": TOKENS
    | {
        "text_config": TEXT | {"head_dim": 16, "rope_parameters": MROPE},
        "vision_config": QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_5": TOKENS
    | {
        "text_config": TEXT
        | {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "rope_parameters": MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "vision_config": QWEN | {"num_position_embeddings": 64},
    },
    "glm4v": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": QWEN | {"image_size": 84},
        "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START,
        "image_end_token_id": END, "video_start_token_id": 94, "video_end_token_id": 95,
    },
    "gemma3": {
        "text_config": TEXT | WINDOWS | {"head_dim": 16},
        "vision_config": VIT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": 9, "image_token_index": IMAGE, "image_token_id": IMAGE,
        "boi_token_index": START, "eoi_token_index": END,
    },
    "gemma4": {
        "text_config": TEXT
        | WINDOWS
        | {
            "head_dim": 16, "global_head_dim": 16, "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": None, "image_token_id": IMAGE, "boi_token_id": START, "eoi_token_id": END,
        "video_token_id": VIDEO, "audio_token_id": 96, "boa_token_id": 97, "eoa_token_index": 98,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VIT | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE, "image_seq_length": 36,
    },
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": VIT, "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": VIT, "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VIT | {"image_size": [84, 84], "patch_size": [14, 14]},
        "image_token_id": IMAGE, "image_seq_length": 9, "downsample_ratio": 0.5,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "vision_config": VIT | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE, "image_token_id": IMAGE, "spatial_merge_size": 2,
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma", "head_dim": 16},
        "vision_config": VIT | {"model_type": "siglip_vision_model"}, "projection_dim": 64,
        "image_token_index": IMAGE, "image_token_id": IMAGE,
    },
}  # fmt: skip
REFUSED = ("paligemma",)
SERVED = tuple(name for name in CONFIGS if name not in REFUSED)
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
BLOCKS = ("gemma3", "gemma4")


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Random weights, spread wide enough for attention to matter."""
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **CONFIGS[name]))
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.mul_(4)
    whole: PreTrainedModel = model.eval().requires_grad_(False)
    return whole


@dataclass
class Picture:
    """Patches high and wide, before they are merged; tokens of it are fewer by the model's merge."""

    rows: int = 6
    columns: int = 8
    seed: int = 0


def tokens(name: str, picture: Picture) -> int:
    """How many tokens a picture takes."""
    if name in GRIDS:
        return picture.rows * picture.columns // 4
    if name == "gemma4":
        return picture.rows * picture.columns // 4
    return 36 if name == "llava" else 9


def prompt(name: str, parts: Iterable[list[int] | Picture]) -> dict[str, Any]:
    """The arguments of one call: text and pictures as a processor gives them."""
    ids: list[int] = []
    pixels, grids, places = [], [], []
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        ids += [START, *[IMAGE] * tokens(name, part), END]
        random = torch.Generator().manual_seed(part.seed)
        count = part.rows * part.columns
        if name in GRIDS:
            pixels.append(torch.randn(count, 3 * 2 * 14 * 14, generator=random))
            grids.append([1, part.rows, part.columns])
        elif name == "gemma4":
            at, patches = torch.arange(count), torch.rand(1, count, 3 * 4 * 4, generator=random)
            where = torch.stack([at % part.columns, at // part.columns], 1)[None]
            # padded to the patches of the largest
            pixels.append(functional.pad(patches, (0, 0, 0, 48 - count)))
            places.append(functional.pad(where, (0, 0, 0, 48 - count), value=-1))
        else:
            pixels.append(torch.randn(1, 3, 84, 84, generator=random))
    row = torch.tensor([ids])
    given: dict[str, Any] = {"input_ids": row}
    if name in (*GRIDS, "gemma4"):
        given["mm_token_type_ids"] = (row == IMAGE).long()
    if name == "gemma3":
        given["token_type_ids"] = (row == IMAGE).long()
    if not pixels:
        return given
    if name in ("idefics3", "smolvlm"):
        given["pixel_values"] = torch.cat(pixels)[None]
    else:
        given["pixel_values"] = torch.cat(pixels)
    if name in GRIDS:
        given["image_grid_thw"] = torch.tensor(grids)
    if name == "gemma4":
        given["image_position_ids"] = torch.cat(places)
    if name == "mistral3":
        given["image_sizes"] = torch.tensor([[84, 84]] * len(pixels))
    return given


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())
