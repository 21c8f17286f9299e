"""Write the demo with eyes as package data: a folder that both libraries open, and a sample picture."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import load_gates, save_gates
from mlx_kvret.core.config import EvictionDefaults
from mlx_kvret.core.files import whole_file, whole_folder
from mlx_kvret.demo.language import BOS, END
from mlx_kvret.demo.pictures import (
    CELL,
    DECOY,
    FACT,
    MERGE,
    NAMES,
    PALETTE,
    PATCH,
    START,
    VISION,
    cells,
    picture,
)

_MOST_CELLS = 1024
_NAMED = dict(
    zip(("vision_start_token", "image_token", "vision_end_token", "video_token"), VISION, strict=True)
)
# as the text demo's, with pictures among a message's parts
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}"
    "{{ ' ' + message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
)
# what the sample picture says: facts and, of other colours, decoys
SAMPLE_FACTS = {"Ada": "red", "Gilda": "blue", "Oscar": "green", "Thea": "purple"}
SAMPLE_DECOYS = {"Ada": "yellow", "Karl": "orange", "Thea": "cyan", "Mabel": "pink", "Oscar": "black"}


def write_model(folder: Path, model: Qwen3VLForConditionalGeneration) -> None:
    """Weights, config, tokenizer, chat template and processor."""
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, do_sample=False)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    with whole_folder(fresh) as scratch:
        model.save_pretrained(scratch)
        _write_config(scratch / "config.json")
        _write_tokenizer(scratch)
        (scratch / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
        pixels = {"shortest_edge": CELL**2, "longest_edge": CELL**2 * _MOST_CELLS}
        processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen3VLProcessor",
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": 2,
            "min_pixels": pixels["shortest_edge"],
            "max_pixels": pixels["longest_edge"],
            "size": pixels,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        _write_json(scratch / "preprocessor_config.json", processor)
        for file in scratch.iterdir():
            file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def write_gates(folder: Path, chosen: Path, told: dict[str, Any]) -> None:
    """A copy of the chosen checkpoint, with more about where it comes from, and its defaults."""
    gates = load_gates(chosen)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    config = dataclasses.replace(gates.config, eviction=EvictionDefaults(min_per_head=1))
    save_gates(fresh, config, gates.tensors, gates.provenance | told)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def write_sample(path: Path) -> None:
    """A picture of six by six cells that states ``SAMPLE_FACTS`` among decoys."""
    rng = np.random.default_rng(5)
    kinds, names, values = np.zeros((3, 36), np.int64)
    said = [(FACT, *fact) for fact in SAMPLE_FACTS.items()] + [
        (DECOY, *decoy) for decoy in SAMPLE_DECOYS.items()
    ]
    for place, (kind, name, value) in zip(rng.permutation(36), said, strict=False):
        kinds[place], names[place], values[place] = kind, NAMES.index(name), list(PALETTE).index(value)
    drawn = picture(cells(rng, kinds, names, values), 6, 6)
    with whole_file(path) as scratch:
        Image.fromarray(drawn.pixels).save(scratch, format="png")
        scratch.chmod(0o644)


def _write_config(path: Path) -> None:
    """Settings of RoPE also where older readers look for them; the tower's type as in published ones."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config["text_config"]["rope_parameters"]
    config["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope | {"type": "default"}}
    config["vision_config"]["model_type"] = "qwen3_vl"
    _write_json(path, config)


def _write_tokenizer(folder: Path) -> None:
    """The demo's words, and the four that stand around and for pictures."""
    data = json.loads((demo.MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    for index, word in enumerate(VISION, START):
        data["model"]["vocab"][word] = index
        data["added_tokens"].append(
            {"id": index, "content": word, "single_word": False, "lstrip": True, "rstrip": True}
            | {"normalized": False, "special": True}
        )
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
    config = json.loads((demo.MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    more = {"processor_class": "Qwen3VLProcessor", "extra_special_tokens": _NAMED}
    _write_json(folder / "tokenizer_config.json", config | _NAMED | more)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
