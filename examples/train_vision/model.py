"""A stock Qwen3-VL around the demo model: its configuration, and what its decoder is given for albums."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mlx_kvret import demo
from mlx_kvret.bitmap import Bitmap
from mlx_kvret.demo.albums import Album
from mlx_kvret.demo.pictures import CELL, IMAGE, MERGE, PATCH, START, STOP, VIDEO, WORDS

_TEXT = json.loads((demo.MODEL / "config.json").read_text(encoding="utf-8"))
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "rms_norm_eps"),
)
CONFIG = Qwen3VLConfig(
    architectures=["Qwen3VLForConditionalGeneration"],
    text_config={name: _TEXT[name] for name in _SIZES}
    | {
        "vocab_size": len(WORDS),
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
    vision_config={
        "depth": 2,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": _TEXT["hidden_size"],
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0],
    },
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=STOP,
    tie_word_embeddings=True,
    dtype="float32",
)
Given = dict[str, Any]


def new_model() -> Qwen3VLForConditionalGeneration:
    """The demo's weights, unchanged, in the language model; the vision tower and four words are new."""
    model = Qwen3VLForConditionalGeneration(CONFIG)
    known = AutoModelForCausalLM.from_pretrained(demo.MODEL, trust_remote_code=False).model.state_dict()
    words = model.model.language_model
    with torch.no_grad():
        old, table = known.pop("embed_tokens.weight"), words.embed_tokens.weight
        table[: len(old)] = old
        noise = torch.randn(len(table) - len(old), old.shape[1])
        table[len(old) :] = old.mean(0) + 0.3 * old.std(0) * noise
        missing, unexpected = words.load_state_dict(known, strict=False)
        assert missing == ["embed_tokens.weight"] and not unexpected, (missing, unexpected)
        for name, weight in model.model.visual.named_parameters():
            if weight.dim() >= 2:
                torch.nn.init.normal_(weight, std=0.1 if "pos_embed" in name else weight[0].numel() ** -0.5)
    return model


def patches(pictures: list[Bitmap]) -> torch.Tensor:
    """What Qwen's image processor makes of pictures of whole cells: (patches, 3 · 2 · PATCH²) in -1..1."""
    parts = []
    for p in pictures:
        cut = p.pixels.reshape(p.height // CELL, MERGE, PATCH, p.width // CELL, MERGE, PATCH, 3)
        cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # rows, columns, 2, 2, colour, y, x
        twice = np.repeat(cut[:, :, :, :, :, None], 2, axis=5)  # two frames in time
        parts.append(twice.reshape(-1, 3 * 2 * PATCH**2).astype(np.float32) / 127.5 - 1)
    return torch.from_numpy(np.concatenate(parts))


def grids(pictures: list[Bitmap]) -> torch.Tensor:
    """Time, height and width of pictures in patches, (pictures, 3)."""
    return torch.tensor([(1, p.height // PATCH, p.width // PATCH) for p in pictures])


def positions(album: Album, tokens: int) -> np.ndarray:
    """M-RoPE positions (3, tokens) as Qwen3-VL counts them: a picture takes its longer side of them."""
    out, now, at, left = np.zeros((3, len(album.ids)), np.int64), 0, 0, iter(album.pictures)
    while at < len(album.ids):
        if album.ids[at] == IMAGE:
            p = next(left)
            rows, columns = p.height // CELL, p.width // CELL
            here = slice(at, at + rows * columns)
            out[0, here], out[1, here] = now, now + np.repeat(np.arange(rows), columns)
            out[2, here] = now + np.tile(np.arange(columns), rows)
            now, at = now + max(rows, columns), here.stop
        else:
            out[:, at] = now
            now, at = now + 1, at + 1
    return out[:, :tokens]


def embed(model: Any, albums: list[Album], tokens: int) -> Given:
    """The decoder's arguments for the first tokens of B albums, none of whose pictures is cut."""
    ids = torch.tensor([a.ids[:tokens] for a in albums])
    x, seen = model.model.get_input_embeddings()(ids), ids == IMAGE
    position = torch.from_numpy(np.stack([positions(a, tokens) for a in albums], 1))
    given: Given = {"inputs_embeds": x, "position_ids": position}
    pictures = [p for a in albums for p in a.pictures]
    if not pictures:
        return given
    out = model.model.visual(patches(pictures), grid_thw=grids(pictures), return_dict=True)
    return given | {
        "inputs_embeds": x.masked_scatter(seen[..., None], out.pooler_output),
        "visual_pos_masks": seen,
        "deepstack_visual_embeds": out.deepstack_features,
    }
