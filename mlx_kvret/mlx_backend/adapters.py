"""Adapters that mlx-lm has trained, put on a model before it is hooked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters

from ..errors import CheckpointError

_LEAVES = ("lora_a", "lora_b", "m")


def add_adapter(model: nn.Module, folder: Path) -> None:
    """Put an adapter on a model, in place.

    Raises:
        CheckpointError: the folder holds none of mlx-lm's, or one of another model.
    """
    weights = folder / "adapters.safetensors"
    if not weights.is_file() or not (folder / "adapter_config.json").is_file():
        advice = "one of PEFT must be merged into its model first; " if any(folder.glob("*_model.*")) else ""
        raise CheckpointError(
            f"{folder} holds no adapter of mlx-lm ({advice}expected adapter_config.json and "
            "adapters.safetensors); give the folder that mlx_lm.lora wrote"
        )
    try:
        load_adapters(model, str(folder))
        stored: Any = mx.load(str(weights))
        missing = _adapted(model) - stored.keys()
    except Exception as error:  # its configuration is read without a check
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"the adapter in {folder} does not go on this model ({type(error).__name__}: {reason}); give the "
            "model it was trained on, or copy it again"
        ) from error
    if missing:
        raise CheckpointError(
            f"the adapter in {folder} lacks {len(missing)} tensors, among them {min(missing)}; copy it again"
        )
    model.eval()


def _adapted(model: nn.Module) -> set[str]:
    """Names of the parameters that an adapter brings."""
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return {name for name, _ in weights if name.rpartition(".")[2] in _LEAVES}
