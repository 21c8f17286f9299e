"""Folders on disk to what runs in torch: a model without hooks, its tokenizer, gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from mlx_kvret.converters.forms import load_any
from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.loading import check_needless, reading_tokenizer, tried
from mlx_kvret.core.model_folder import model_config
from mlx_kvret.core.options import of_type
from mlx_kvret.core.vision import check_vision, has_vision
from mlx_kvret.errors import CheckpointError, ConfigError, MissingDependencyError, UnsupportedModelError
from mlx_kvret.hub import resolve

from .memory import out_of_memory
from .processors import read_processor

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_tokenizer(
    folder: Path, trust_remote_code: bool = False, options: dict[str, Any] | None = None
) -> Any:
    """A model folder's tokenizer, for a model that sees its processor; None where there is none."""
    if not any((folder / name).exists() for name in TOKENIZERS):
        check_needless(options, folder)
        return None
    given = {"trust_remote_code": trust_remote_code} | (options or {})
    with reading_tokenizer(folder):
        if has_vision(model_config(folder)) and any((folder / name).exists() for name in PROCESSORS):
            return read_processor(folder, given)
        return tried(AutoTokenizer.from_pretrained(folder, **given))


def checked_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ConfigError: torch does not know it or does not see it.
    """
    of_type("device", device, (str, torch.device), 'a device such as "cpu" or "cuda:0"')
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}, unknown to torch; give cpu, cuda or cuda:N") from error
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("torch sees no CUDA device; use backend torch for the CPU, or mend the driver")
        if (found.index or 0) >= (count := torch.cuda.device_count()):
            raise ConfigError(f"device is {device!r}, and torch sees {count} CUDA devices; give a lower one")
    elif found.type == "meta" or (found.type == "mps" and not torch.backends.mps.is_available()):
        raise ConfigError(f"device is {device!r}, where nothing can be computed here; give cpu or cuda")
    return found


def checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A float type that a model can have, or ``"auto"``."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"dtype is {dtype!r}; expected auto, float32, bfloat16, float16 or one of torch's")
    return dtype if dtype == "auto" else found  # type: ignore[return-value]


def model_class(config: dict[str, Any]) -> Any:
    """What opens a model with this config: one that sees as such, not as the language model within.

    Raises:
        UnsupportedModelError: it would answer wrongly.
    """
    check_vision(config.get("model_type"))
    return AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """transformers' loader with errors that say what to do; code in the folder is not run unless asked for.

    Raises:
        CheckpointError: the folder is damaged or incomplete.
        UnsupportedModelError: transformers does not know the architecture, or it is refused by name.
        MissingDependencyError: the model needs a package that is not there.
    """
    network_class = model_class(model_config(folder))
    try:
        options = {"trust_remote_code": False} | options
        loaded: Any = network_class.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(
            f"{folder} holds no whole model ({error}); copy or download it again"
        ) from error
    except ImportError as error:
        raise MissingDependencyError(f"transformers cannot load {folder}: {error}") from error
    except Exception as error:  # model files take a config at its word
        raise UnsupportedModelError(f"transformers cannot load {folder}: {error}") from error
    network, report = loaded
    # transformers fills them with random numbers and says so in a warning
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of its model, among them {missing[0]}; copy or download "
            "it again"
        )
    whole: PreTrainedModel = network.eval().requires_grad_(False)
    return whole


def read_gates(gates: str | Path | GateCheckpoint, revision: str | None = None) -> GateCheckpoint:
    """Gates from a folder or hub id in any form."""
    if isinstance(gates, GateCheckpoint):
        return gates
    return load_any(resolve(gates, "gates", revision))
