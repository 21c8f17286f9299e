"""A tiny base model with gates, as if they were known, and models that are copies of it or merely look so."""

import json
from pathlib import Path

import mlx.core as mx
import torch
from cuda.tiny import checkpoint
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.zoo import known
from mlx_kvret.zoo.identity import folder_norms, norms_digest

NAME = "maker/Tiny-1B-Instruct"
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "rope_theta": 50000.0,
}  # fmt: skip


def write_model(folder: Path, dtype=torch.bfloat16, tuned=0.0) -> Path:
    """The base in a float type; ``tuned`` moves every weight a little."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + torch.randn_like(weight) / 8)
            weight.copy_((weight.to(torch.bfloat16) + tuned).to(torch.bfloat16))
    model.to(dtype).save_pretrained(folder)
    path = folder / "config.json"
    # where mlx-lm looks for it
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": SIZES["rope_theta"]}))
    return folder


def write_quantized(source: Path, folder: Path) -> Path:
    """As ``mlx_lm.convert -q`` does."""
    model, config = load_model(source)
    model, config = quantize_model(model, config, 32, 4)
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    mx.eval(model.parameters())
    return folder


def write_gates(folder: Path) -> Path:
    torch.manual_seed(0)
    made = checkpoint(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)), 2)
    save_gates(folder, made.config, made.tensors)
    return folder


def base(folder: Path, with_norms=True) -> known.Base:
    config = json.loads((folder / "config.json").read_text())
    return known.Base(NAME, fingerprint(config), norms_digest(folder_norms(folder)) if with_norms else None)
