"""Small trimkv folders as the released ones are built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LAYERS, HEADS, HIDDEN, WIDTH = 3, 2, 64, 32
TEXT, VISION = "model.", "model.language_model."


def config(kind: str = "rg10", tied: bool = True, vision: bool = False, **more: Any) -> dict[str, Any]:
    base = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "head_dim": 16,
        "hidden_act": "silu",
        "rope_theta": 1000000,
    }
    gate = {
        "retention_gate": kind,
        "retention_gate_intermediate_size": WIDTH,
        "retention_gate_bias_init": 18.0,
        "tie_retention_gate_layers": tied,
    }
    top = {"memory_size": 128, "global_capacity": kind == "rg10", "base_model": "org/base-é"}
    # the released vision-language folders nest what shapes the gate, and nothing else
    joined = {"text_config": base | gate} if vision else base | gate
    return {"model_type": "test"} | joined | top | more


def state(
    kind: str = "rg10",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    prefix: str = TEXT,
    layers: tuple[int, ...] = tuple(range(LAYERS)),
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def last() -> tuple[torch.Tensor, torch.Tensor]:
        return random(HEADS, WIDTH), random(HEADS) + 8

    shared = last()
    tensors = {}
    for layer in layers:
        weight, bias = shared if tied else last()
        own = {"bias": bias, "linear1.weight": random(WIDTH, HIDDEN), "linear1.bias": random(WIDTH)}
        if kind == "rg10":
            own |= {"linear2.weight": random(WIDTH, WIDTH), "linear2.bias": random(WIDTH)}
        own["linear3.weight" if kind == "rg10" else "linear2.weight"] = weight
        tensors |= {f"{prefix}layers.{layer}.self_attn.retention_gate.{n}": t for n, t in own.items()}
    return tensors


def write(folder: Path, config: dict[str, Any], state: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "trimkv_weights.pth")
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    weights = torch.load(folder / "trimkv_weights.pth", weights_only=True)
    return json.loads((folder / "config.json").read_text()), weights


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].numpy(force=True).tobytes() == tensor.numpy().tobytes() if (
            tensor.dtype != torch.bfloat16
        ) else torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.fixture
def trimkv_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``tmp_path/released`` from keywords of :func:`config` and :func:`state`."""

    def make(
        kind: str = "rg10", tied: bool = True, dtype: torch.dtype = torch.float32, vision: bool = False
    ) -> Path:
        weights = state(kind, tied, dtype, VISION if vision else TEXT)
        return write(tmp_path / "released", config(kind, tied, vision), weights)

    return make
