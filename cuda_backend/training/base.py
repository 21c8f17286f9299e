"""The base model: loading it, and whether a training step on it fits in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mlx_kvret.core.checkpoint import read_json
from mlx_kvret.errors import ConfigError, TrainingError, UnsupportedModelError

from .attention import ROWS
from .loss import CHUNK_ELEMENTS

# bytes of logits per element: student, teacher, their softmax and gradients in float32
_LOGIT_COPIES = 5 * 4


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``, refused if it is not a transformers model."""
    config = read_json(folder / "config.json")
    if "quantization" in config:
        raise UnsupportedModelError(
            f"{folder} was quantised for MLX, which torch cannot open; give the original model"
        )
    return config


def load(folder: Path, dtype: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer.

    Raises:
        ConfigError: the files are damaged or incomplete.
        UnsupportedModelError: transformers does not know the architecture.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to(device), tokenizer
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers cannot open {folder}: {_first_line(error)}") from error
    except Exception as error:  # whatever its loaders meet in a damaged folder
        if out_of_memory(error):
            raise TrainingError(f"{folder} does not fit on {device}; use a smaller model") from error
        raise ConfigError(
            f"cannot open the model in {folder}: {_first_line(error)}; copy or download it again"
        ) from error


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine refused an allocation; the CPU's error has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs beside the model: a fixed part, and two for every token of a micro-batch.

    Worked out from shapes, within a fifth of what was measured on a CPU; logits stop growing at a chunk.
    """

    fixed: int
    per_token: int
    logits_per_token: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, heads: int, gate_parameters: int, width: int, recompute: bool
    ) -> Memory:
        """``heads`` is L·H of the layers with gates."""
        config, size = model.config.get_text_config(), model.dtype.itemsize
        hidden, layers = config.hidden_size, config.num_hidden_layers
        inner = getattr(config, "intermediate_size", 4 * hidden)
        kept = hidden if recompute else 4 * hidden + 3 * inner
        # one layer with its gradients and the float32 inside of its gate
        layer = (12 * hidden + 6 * inner) * size + 4 * (hidden + 6 * width)
        # a block's mask, as bool and as a float bias, and log β with soft sizes and gradients
        small = 5 * ROWS + 40 * heads
        logits = _LOGIT_COPIES * config.vocab_size
        # weights, gradients and two moments of the gates
        return cls(16 * gate_parameters, (layers * kept + 6 * hidden) * size + layer + small, logits)

    def needed(self, tokens: int) -> int:
        """Bytes for a micro-batch of that many tokens."""
        return self.fixed + tokens * self.per_token + self._logits(tokens)

    def _logits(self, tokens: int) -> int:
        return min(tokens * self.logits_per_token, _LOGIT_COPIES * CHUNK_ELEMENTS)

    def require(self, tokens: int, device: torch.device) -> None:
        """Refuse a micro-batch of that many tokens if it cannot fit, and say what would.

        Raises:
            TrainingError: too little is free on the device, where the model lies already.
        """
        free, needed = free_bytes(device), self.needed(tokens)
        if free is not None and needed > free:
            raise TrainingError(
                f"a step needs about {_gb(needed)} beside the model, and {device} has {_gb(free)} free; "
                f"{self.advice(free)}"
            )

    def advice(self, free: int) -> str:
        """What would fit into that many bytes."""
        room, chunk = free - self.fixed, _LOGIT_COPIES * CHUNK_ELEMENTS
        # at most one chunk of logits, or less than one
        tokens = max((room - chunk) // self.per_token, 0) or room // (self.per_token + self.logits_per_token)
        if tokens < 64:
            return "not even short sequences would fit; use a smaller model or another device"
        return f"about {tokens:,} tokens fit: lower --length times --micro-batch below that"


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
