"""Folders of tiny vision-language models: weights, tokenizer, chat template, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny_torch import END, IMAGE, START, VIDEO, WORDS, tiny_model

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PATCHES = HALF | {
    "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16},
}  # fmt: skip
SQUARE = HALF | {"size": {"height": 84, "width": 84}}
# what a model calls the tokens around a picture and for its patches
NAMES = {
    "qwen": {
        IMAGE: "<|image_pad|>",
        START: "<|vision_start|>",
        END: "<|vision_end|>",
        VIDEO: "<|video_pad|>",
    },
    "glm4v": {IMAGE: "<|image|>", START: "<|begin_of_image|>", END: "<|end_of_image|>", VIDEO: "<|video|>"},
    "gemma3": {IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>"},
    "gemma4": {IMAGE: "<|image|>", START: "<|image>", END: "<image|>", 96: "<|audio|>", VIDEO: "<|video|>"},
    "llava": {IMAGE: "<image>"},
    "idefics3": {IMAGE: "<image>", START: "<fake_token_around_image>", 94: "<global-img>"},
    "internvl": {IMAGE: "<IMG_CONTEXT>", START: "<img>", END: "</img>"},
}
_QWEN = {"image_processor_type": "Qwen2VLImageProcessor"} | PATCHES
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLProcessor", _QWEN, {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", _QWEN, {}),
    "qwen3_vl": ("Qwen3VLProcessor", _QWEN, {}),
    "qwen3_5": ("Qwen3VLProcessor", _QWEN, {}),
    "glm4v": ("Glm4vProcessor", {"image_processor_type": "Glm4vImageProcessor"} | PATCHES, {}),
    "gemma3": (
        "Gemma3Processor",
        {"image_processor_type": "Gemma3ImageProcessor"} | SQUARE,
        {"image_seq_length": 9},
    ),
    "gemma4": (
        "Gemma4Processor",
        {"image_processor_type": "Gemma4ImageProcessor", "patch_size": 4, "pooling_kernel_size": 2,
         "max_soft_tokens": 70},
        {},
    ),
    "llava": (
        "LlavaProcessor",
        {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 84, "width": 84}} | HALF
        | {"size": {"shortest_edge": 84}},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "idefics3": (
        "Idefics3Processor",
        {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": False,
         "size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 84}} | HALF,
        {"image_seq_len": 9},
    ),
    "smolvlm": (
        "SmolVLMProcessor",
        {"image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": False,
         "size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 84}} | HALF,
        {"image_seq_len": 9},
    ),
    "internvl": (
        "InternVLProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False} | SQUARE,
        {"image_seq_length": 9},
    ),
}  # fmt: skip
MARKS = {
    "qwen": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "glm4v": "<|begin_of_image|> <|image|> <|end_of_image|>",
    "gemma3": "<start_of_image>", "gemma4": "<|image|>", "llava": "<image>", "idefics3": "<image>",
    "internvl": "<IMG_CONTEXT>",
}  # fmt: skip
TEMPLATE = """{{ bos_token }}{% for m in messages %} \
{{ 'w12' if m['role'] == 'assistant' else 'w10' }} {% if m['content'] is string %}{{ m['content'] }}\
{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %} MARK {% else %} {{ p['text'] }}{% endif %}\
{% endfor %}{% endif %} w11{% endfor %}{% if add_generation_prompt %} w12{% endif %}"""


def family(name: str) -> str:
    return {"smolvlm": "idefics3"}.get(name, "qwen" if name.startswith("qwen") else name)


def folder(name: str, path: Path) -> Path:
    """A model that ``load`` opens; its words are w5, w6, ..."""
    tiny_model(name).save_pretrained(path)
    beside(path, name, NAMES[family(name)], MARKS[family(name)], KINDS[name])
    return path


def beside(
    path: Path, name: str, own: dict[int, str], mark: str, made: tuple[str, dict[str, Any], dict[str, Any]]
) -> None:
    """Write tokenizer, chat template and processor; ``own`` are the tokens around and of a picture.

    ``made`` are the processor's class, the settings of its pictures, and its own.
    """
    special = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"} | own
    words = Tokenizer(models.WordLevel({special.get(i, f"w{i}"): i for i in range(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"image_token": own[IMAGE]}
    tokens |= {"boi_token": own[START], "eoi_token": own[END]} if name.startswith("gemma") else {}
    if name == "gemma4":
        tokens |= {"audio_token": own[96], "boa_token": own[96], "eoa_token": own[96]}
    if name == "internvl":
        tokens = {"context_image_token": own[IMAGE], "start_image_token": own[START],
                  "end_image_token": own[END],
                  "video_token": "<video>"}  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=tokens, additional_special_tokens=list(own.values()),
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    kind, image, more = made
    (path / "preprocessor_config.json").write_text(json.dumps(image | {"processor_class": kind}))
    (path / "processor_config.json").write_text(json.dumps(more | {"processor_class": kind}))
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("MARK", mark))
