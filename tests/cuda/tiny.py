"""Tiny random transformers models and gates for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.cuda_backend.gates import RetentionGates, from_checkpoint

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        # the same for mlx-lm
        "sliding_window_pattern": 2,
    },
}


def config(family: str) -> Any:
    return AutoConfig.for_model(family, **SIZES | FAMILIES[family])


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Random weights, spread wide enough for attention to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name and "lm_head" not in name:
            weight.mul_(4)
    return model


def checkpoint(model: PreTrainedModel, layers: int, kind: str = "rg10", seed: int = 1) -> GateCheckpoint:
    """Random gates whose log β ranges from about -10 to -0.001."""
    text = model.config.get_text_config()
    gates = GateConfig(
        kind, layers, text.num_key_value_heads, text.hidden_size, width=16, base_model=text.model_type,
        base_fingerprint=fingerprint(model.config.to_dict()),
    )  # fmt: skip
    random = np.random.default_rng(seed)
    tensors = {
        name: Tensor.of((random.normal(size=shape) / shape[-1] ** 0.5 * 3).astype(np.float32))
        for name, shape in gates.tensor_shapes().items()
    }
    return GateCheckpoint(gates, tensors)


def attached(family: str) -> tuple[PreTrainedModel, hooks.Attachment]:
    """A hooked model with gates that remember every log β they gave."""
    model = tiny_model(family)
    layers = sum(kind != "sliding_attention" for kind in getattr(model.config, "layer_types", [""] * 3))
    gates = from_checkpoint(checkpoint(model, layers))
    return model, hooks.install(model, Remembering(gates), {"model": fingerprint(model.config.to_dict())})


def new_cache(model: PreTrainedModel, **options: Any) -> BoundedCache:
    made = hooks.attachment(model)
    assert made is not None
    return hooks.new_cache(model, made, EvictionConfig.create(**options))


def run(model: PreTrainedModel, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **cache_argument(model, cache), **options).logits


class Remembering(RetentionGates):
    """``given[layer]`` lists log β (R, T, H) in the order of the calls."""

    def __init__(self, gates: RetentionGates) -> None:
        super().__init__(gates.config)
        self.load_state_dict(gates.state_dict(), assign=True)
        self.given: dict[int, list[torch.Tensor]] = {}

    def log_beta(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        out = super().log_beta(layer, x)
        self.given.setdefault(layer, []).append(out)
        return out

    def log_betas(self, x: torch.Tensor) -> torch.Tensor:
        out = super().log_betas(x)
        for layer, own in zip(self.stacked, out, strict=True):
            self.given.setdefault(layer, []).append(own)
        return out

    def history(self, row: int = 0) -> np.ndarray:
        """All log β so far as (L·H, tokens)."""
        parts = [torch.cat(self.given[layer], 1)[row].T for layer in sorted(self.given)]
        return torch.cat(parts).numpy()
