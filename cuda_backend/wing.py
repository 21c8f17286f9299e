"""The torch wing's side of the public functions in :mod:`mlx_kvret.api`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mlx_kvret import demo
from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.checkpoint import GateCheckpoint, check_base
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.request import Sampling, eviction
from mlx_kvret.core.snapshot import read_snapshot, write_snapshot
from mlx_kvret.core.tensors import tensors_id
from mlx_kvret.errors import CheckpointError, ConfigError, MissingDependencyError, UnsupportedModelError
from mlx_kvret.hub import resolve

from . import hooks, snapshots
from .cache import BoundedCache
from .gates import from_checkpoint
from .generation import generate, stream_generate
from .probe import refusals
from .sampling import sampler_of

__all__ = [
    "attach",
    "detach",
    "generate",
    "load",
    "load_cache",
    "make_cache",
    "save_cache",
    "stream_generate",
]

NEEDED = {"torch": "2.6", "transformers": "5.20"}
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load(
    model: str | Path, gates: str | Path | None = None, *, device: str = "cpu", **options: Any
) -> tuple[PreTrainedModel, Any]:
    """As :func:`mlx_kvret.load`; ``options`` are those of ``AutoModelForCausalLM.from_pretrained``."""
    if str(model) == "demo":
        model, gates = demo.MODEL, demo.GATES if gates is None else gates
    check_versions()
    folder = resolve(model)
    checkpoint = None if gates is None else read_gates(gates)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device; use backend torch for the CPU, or mend the driver")
    network: Any = _load_model(folder, **options)
    network.to(device)
    has_tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    return attach(network, checkpoint), tokenizer


def check_versions() -> None:
    """Refuse a torch or transformers that is too old.

    Raises:
        MissingDependencyError: names what was found and the command that mends it.
    """
    for name, least in NEEDED.items():
        found = metadata.version(name)
        if Version(found) < Version(least):
            raise MissingDependencyError(
                f"{name} is {found}, expected at least {least}; run `pip install -U '{name}>={least}'`"
            )


def _load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """transformers' loader with errors that say what to do."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; expected a model folder with safetensors")
    try:
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{folder} holds no whole model ({error}); copy or download it again"
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(f"transformers cannot load {folder}: {error}") from error
    return network.eval().requires_grad_(False)


def read_gates(gates: str | Path | GateCheckpoint) -> GateCheckpoint:
    """Gates from a folder or hub id in any form."""
    if isinstance(gates, GateCheckpoint):
        return gates
    from converters import load_any

    return load_any(resolve(gates, "gates"))


def attach(model: PreTrainedModel, gates: str | Path | GateCheckpoint | None = None) -> PreTrainedModel:
    """As :func:`mlx_kvret.attach`."""
    checkpoint = None if gates is None else read_gates(gates)
    config = model.config.to_dict()
    owner, made = {"model": fingerprint(config)}, None
    if checkpoint is not None:
        check_base(checkpoint.config, config)
        made = from_checkpoint(checkpoint)
        owner["gates"] = tensors_id(checkpoint.tensors)
    hooks.remove(model)
    hooks.install(model, made, owner)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """As :func:`mlx_kvret.detach`."""
    hooks.remove(model)
    return model


def make_cache(
    model: PreTrainedModel, budget: int | str | None = None, buffer: int | None = None, **options: Any
) -> BoundedCache:
    """As :func:`mlx_kvret.make_cache`."""
    attached = hooks.attachment(model) or hooks.attachment(attach(model))
    assert attached is not None
    config = eviction(attached.layout.shape, budget, buffer, gates=attached.gate_config, **options)
    return hooks.new_cache(model, attached, config)


def save_cache(
    model: PreTrainedModel, cache: BoundedCache, path: str | Path, notes: dict[str, str] | None = None
) -> None:
    """As :func:`mlx_kvret.save_cache`."""
    write_snapshot(path, snapshots.take(cache, notes or {}))


def load_cache(model: PreTrainedModel, path: str | Path) -> tuple[BoundedCache, dict[str, str]]:
    """As :func:`mlx_kvret.load_cache`."""
    snapshot = read_snapshot(path)
    return hooks.reopened_cache(model, snapshot), snapshot.notes


def full_nbytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of keys and values that a full cache of the bounded layers would take."""
    attached = hooks.attachment(model)
    assert attached is not None
    return attached.layout.shape.full_nbytes(tokens)


def sampling(temp: float, top_p: float, seed: int | None) -> dict[str, Any]:
    """Options of :func:`stream_generate` that draw tokens with a temperature; 0 is greedy."""
    draw = sampler_of(Sampling(temp, top_p, seed))
    return {} if draw is None else {"sampler": draw}


def cache_shape(folder: Path) -> tuple[dict[str, Any], CacheShape]:
    """A model folder's config and what its bounded layers cache; no weights are read."""
    config = AutoConfig.from_pretrained(folder)
    with refusals(config.model_type), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = hooks.shape_of(model.eval())
    return config.to_dict(), shape
