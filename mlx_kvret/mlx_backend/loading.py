"""Folders on disk to what runs in MLX: a model without hooks, its tokenizer, gates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model, load_tokenizer

from mlx_kvret.converters.forms import detect, load_any
from mlx_kvret.converters.mlx_form import load_mlx_gates

from ..core.checkpoint import GateCheckpoint
from ..core.loading import check_needless, reading_tokenizer, tried
from ..core.model_folder import model_config as stored_config
from ..errors import CheckpointError, KVRetError, UnsupportedModelError
from ..hub import resolve
from . import rope
from .gates import RetentionGates

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tiktoken.model")


# how MLX says that weights are not those of the model
_WEIGHTS = re.compile(r"Missing \d+ parameters|Received \d+ parameters not in model|Expected shape")


def read_tokenizer(
    folder: Path,
    config: dict[str, Any],
    trust_remote_code: bool = False,
    options: dict[str, Any] | None = None,
) -> Any:
    """A model folder's tokenizer as mlx-lm wraps it; None where there is none."""
    if not any((folder / name).exists() for name in TOKENIZERS):
        check_needless(options, folder)
        return None
    given = {"trust_remote_code": trust_remote_code} | (options or {})
    with reading_tokenizer(folder):
        return tried(load_tokenizer(folder, given, eos_token_ids=config.get("eos_token_id")))


def plain_tokenizer(folder: Path) -> Any:
    """A model folder's tokenizer of transformers, without mlx-lm's wrapping; None where there is none."""
    if not any((folder / name).exists() for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    with reading_tokenizer(folder):
        return tried(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def load_network(
    folder: Path, rope_length: int | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's ``load_model`` with errors that say what to do: a model without hooks, and its config.

    Its positions are what the config says, see :mod:`mlx_kvret.mlx_backend.rope`; ``rope_length`` as there.
    """
    stored = stored_config(folder)
    try:
        network, config = rope.loaded(load_model, folder, stored, rope_length, **options)
    except KVRetError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no model: {error}; expected config.json and safetensors"
        ) from error
    except (RuntimeError, KeyError, MemoryError) as error:
        raise CheckpointError(f"{folder} is damaged ({error!r}); copy or download the model again") from error
    except (Exception, SystemExit) as error:
        # model files take a config at its word, and end the process where a package they want is missing
        if _WEIGHTS.search(str(error)):
            raise CheckpointError(
                f"{folder} does not hold the weights of its model: {error}; copy or download it again"
            ) from error
        raise UnsupportedModelError(f"mlx-lm cannot load {folder}: {error}") from error
    return network, config


def read_gates(
    gates: str | Path | GateCheckpoint, revision: str | None = None
) -> GateCheckpoint | RetentionGates:
    """Gates from a folder or hub id in any form; those in the MLX form come ready to run."""
    if isinstance(gates, GateCheckpoint):
        return gates
    folder = resolve(gates, "gates", revision)
    if detect(folder) != "mlx":
        return load_any(folder)
    return load_mlx_gates(folder)
