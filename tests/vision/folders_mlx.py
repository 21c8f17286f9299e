"""Folders of tiny models of mlx-vlm with towers of their own, and what their own processors need."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from . import folders_torch as torch_side
from . import tiny_mlx as tiny
from .folders_torch import HALF, KINDS, NAMES

_PIXTRAL_TOKENS = {tiny.IMAGE: "[IMG]", tiny.START: "[IMG_BREAK]", tiny.END: "[IMG_END]"}
_PIXTRAL = {
    "image_processor_type": "PixtralImageProcessor", "patch_size": 14, "size": {"longest_edge": 84},
} | HALF  # fmt: skip
_MARKED = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
# by family: tokens of a picture, what stands for one in a text, and the processor
_KIMI = "<|media_start|> image <|media_content|> <|media_pad|> <|media_end|>"
_OWN: dict[str, tuple[dict[int, str], str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "gemma3": (NAMES["gemma3"], "<start_of_image>", KINDS["gemma3"]),
    "gemma4": (
        NAMES["gemma4"],
        "<|image|>",
        ("Gemma4Processor", {}, {
            "image_processor": {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        }),
    ),
    "llava": (NAMES["llava"], "<image>", KINDS["llava"]),
    "idefics3": (NAMES["idefics3"], "<image>", KINDS["idefics3"]),
    "smolvlm": (NAMES["idefics3"], "<image>", KINDS["smolvlm"]),
    "internvl_chat": (
        NAMES["internvl"],
        "<image>",
        ("InternVLChatProcessor", {"image_processor_type": "InternVLImageProcessor"}, {}),
    ),
    "pixtral": (_PIXTRAL_TOKENS, "[IMG]", ("PixtralProcessor", _PIXTRAL, {"patch_size": 14} | _MARKED)),
    "mistral3": (
        _PIXTRAL_TOKENS,
        "[IMG]",
        ("PixtralProcessor", _PIXTRAL, {"patch_size": 14, "spatial_merge_size": 2} | _MARKED),
    ),
    "kimi_vl": (
        {
            tiny.IMAGE: "<|media_pad|>", tiny.START: "<|media_start|>", tiny.END: "<|media_end|>",
            94: "<|media_content|>",
        },
        _KIMI,
        ("KimiVLProcessor", {
            "image_processor_type": "KimiVLImageProcessor", "patch_size": 14, "in_token_limit": 64,
            "merge_kernel_size": [2, 2],
        } | HALF, {}),
    ),
}  # fmt: skip
NAMED = tuple(_OWN)


def config(name: str) -> dict[str, Any]:
    """The family's config with a tower for the pictures that the processor makes."""
    found = copy.deepcopy(tiny.CONFIGS[name])
    if name == "gemma3":
        found["mm_tokens_per_image"] = found["text_config"]["mm_tokens_per_image"] = 9
    if name == "gemma4":
        found["vision_config"] |= {"patch_size": 4, "pooling_kernel_size": 2}
    if name in ("pixtral", "mistral3"):
        found["vision_config"]["head_dim"] = 16
    if name == "kimi_vl":
        found["media_placeholder_token_id"] = tiny.IMAGE
    return found


def folder(name: str, path: Path) -> Path:
    """A model as mlx-vlm saves one, that ``load`` opens; its words are w5, w6, ..."""
    own = config(name)
    weights: Any = tree_flatten(tiny.build(name, config=own).parameters())
    # some towers' projections begin as ones, to which every picture is the same
    weights = [(k, w + 0.1 * mx.random.normal(w.shape) if w.ndim == 2 else w) for k, w in weights]
    mx.save_safetensors(str(path / "model.safetensors"), dict(weights), metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps({"model_type": name, "eos_token_id": 2} | own))
    tokens, mark, made = _OWN[name]
    torch_side.beside(path, name, tokens, mark, made)
    return path
