"""A folder with a tiny random Qwen3-VL as transformers 5 saves one, with tokenizer, template, processor."""

from __future__ import annotations

import json
import shutil

import numpy as np

from mlx_kvret import demo

MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TEMPLATE = (
    "{% for message in messages %} {{ message['role'] }} :{% if message['content'] is string %}"
    " {{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    " <|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} .{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)
CELL = 16
ROPE = {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True,
}  # fmt: skip


def qwen3_vl(folder, seed: int = 0, head: int = 16):
    """Write the folder; pictures have one token for each cell of 16 x 16 pixels.

    ``head`` is the heads' size, a multiple of 16.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokens = json.loads((demo.MODEL / "tokenizer.json").read_text())
    first = len(tokens["model"]["vocab"])
    for number, mark in enumerate(MARKS, first):
        tokens["model"]["vocab"][mark] = number
        own = {"id": number, "content": mark, "normalized": False, "special": True, "single_word": False}
        tokens["added_tokens"].append(own | {"lstrip": True, "rstrip": True})
    config = Qwen3VLConfig(
        image_token_id=first, video_token_id=first + 1, vision_start_token_id=first + 2,
        vision_end_token_id=first + 3, tie_word_embeddings=True, eos_token_id=1,
        text_config={
            "vocab_size": first + 4, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head,
            "rope_parameters": ROPE | {"mrope_section": [head // 16 * part for part in (2, 3, 3)]},
            "tie_word_embeddings": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.15)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    names = {"image_token": MARKS[0], "video_token": MARKS[1], "vision_start_token": MARKS[2]}
    names |= {"vision_end_token": MARKS[3]}
    own = json.loads((demo.MODEL / "tokenizer_config.json").read_text())
    own |= names | {"processor_class": "Qwen3VLProcessor", "extra_special_tokens": names}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    size = {"shortest_edge": CELL**2, "longest_edge": CELL**2 * 1024}
    image = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor",
        "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2,
        "min_pixels": CELL**2, "max_pixels": CELL**2 * 1024,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copy(demo.MODEL / "generation_config.json", folder)
    return folder


def picture(seed: int, rows: int = 3, columns: int = 4):
    """A picture of noise, (16·rows, 16·columns, 3) bytes."""
    return np.random.default_rng(seed).integers(0, 256, (CELL * rows, CELL * columns, 3), np.uint8)
