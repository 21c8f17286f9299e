"""The base model: loading it, and whether a training step on it fits in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.loading import required
from mlx_kvret.errors import ConfigError, TrainingError, UnsupportedModelError
from mlx_kvret.training.memory import Memory
from mlx_kvret.training.run import Base

from ..loading import load_model, read_tokenizer
from ..memory import out_of_memory
from ..ranks import connected
from .attention import ROWS
from .loss import CHUNK_ELEMENTS
from .sharding import load_sharded
from .student import Student

# bytes of logits per element: student, teacher, their softmax and gradients in float32; blocks of attention
# that looks both ways take less than a chunk of them, and are never there together with it
_LOGIT_COPIES = 5 * 4


def refuse_quantised(base: Base) -> None:
    """Refuse a model that only MLX can open."""
    if "quantization" in base.config:
        raise UnsupportedModelError(
            f"{base.folder} was quantised for MLX, which torch cannot open; give the original model, or use "
            "--backend mlx"
        )


def load(folder: Path, dtype: str, device: torch.device, sharding: Any = None) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer; ``sharding`` as of :func:`.sharding.sharded_over`.

    Raises:
        CheckpointError: the files are damaged or incomplete.
        UnsupportedModelError: transformers does not know the architecture.
        TrainingError: it does not fit in memory.
    """
    try:
        tokenizer = required(read_tokenizer(folder), folder)
        if sharding is not None:
            with connected():
                return load_sharded(folder, dtype, sharding), tokenizer
        model: Any = load_model(folder, dtype=dtype)
        return model.to(device), tokenizer
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(
            f"{folder} does not fit on {device}; use a smaller model, or more processes and --shard"
        ) from error


def choose_device(name: str) -> torch.device:
    """``"auto"``: CUDA if there is any, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {name!r}; expected auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here; use --device cpu")
    return device


def memory_of(student: Student, gate_parameters: int, width: int, recompute: bool) -> Memory:
    """What a step needs beside the model; within a fifth of what was measured on a CPU.

    Of a model that several processes share what is gathered in a step counts, for it is let go between steps.
    """
    model, heads = student.model, student.layers * student.kv_heads
    config, size = model.config.get_text_config(), model.dtype.itemsize
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", 4 * hidden)
    kept = hidden if recompute else 4 * hidden + 3 * inner
    # one layer with its gradients and the float32 inside of its gate
    layer = (12 * hidden + 6 * inner) * size + 4 * (hidden + 6 * width)
    # a block's mask, as bool and as a float bias, and log β with soft sizes and gradients
    small = 5 * ROWS + 40 * heads
    return Memory(
        # weights, gradients and two moments of the gates
        fixed=16 * gate_parameters + student.shards.gathered,
        per_token=(layers * kept + 6 * hidden) * size + layer + small,
        logits_per_token=_LOGIT_COPIES * config.vocab_size,
        chunk=_LOGIT_COPIES * CHUNK_ELEMENTS,
    )
