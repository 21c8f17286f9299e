"""The torch backend's side of the public functions in :mod:`mlx_kvret.api`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.checkpoint import GateCheckpoint, check_base
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.loading import check_loading, check_needless, reading_tokenizer, tried
from mlx_kvret.core.model_folder import model_config
from mlx_kvret.core.options import of_type
from mlx_kvret.core.request import Sampling, check_eviction, eviction, own_eviction
from mlx_kvret.core.snapshot import read_snapshot, write_snapshot
from mlx_kvret.core.tensors import tensors_id
from mlx_kvret.core.types import Array
from mlx_kvret.errors import (
    CheckpointError,
    ConfigError,
    KVRetError,
    MissingDependencyError,
    UnsupportedModelError,
)
from mlx_kvret.hub import resolve
from mlx_kvret.zoo import auto
from mlx_kvret.zoo.identity import Subject, is_norm

from . import hooks, snapshots
from .cache import BoundedCache
from .gates import from_checkpoint
from .generation import generate, stream_generate
from .memory import out_of_memory
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

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


# options of mlx-lm, and why they do nothing here
_MLX_ONLY = {
    "adapter_path": "adapters of mlx-lm are loaded on MLX; merge one of PEFT into its model "
    "(merge_and_unload), save that and load it",
    "model_config": "it is of mlx-lm",
    "get_model_classes": "it is of mlx-lm",
    "lazy": "it is of mlx-lm",
    "strict": "it is of mlx-lm; missing weights are always refused here",
}


def load(
    model: str | Path,
    gates: str | Path | GateCheckpoint | None = auto.AUTO,
    *,
    revision: str | None = None,
    gates_revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    rope_length: int | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    **unknown: Any,
) -> tuple[PreTrainedModel, Any]:
    """As :func:`mlx_kvret.load`.

    Args:
        device: where the model goes, ``"cpu"`` unless given.
        dtype: of the model: ``"auto"`` (as it was saved), ``"bfloat16"``, ``torch.float16``, ...
        rope_length: tokens expected in all, for models whose RoPE depends on the length; their full length
            unless given.
        attn_implementation, device_map, quantization_config: as transformers' ``from_pretrained`` has them.
    """
    check_loading(load, locals(), unknown, _MLX_ONLY)
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map both say where the model goes; give one of them")
    where = checked_device("cpu" if device is None else device)
    options = {
        "dtype": None if dtype is None else checked_dtype(dtype),
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
    }
    folder = resolve(model, "model", revision, trust_remote_code)
    checkpoint = gates if gates is None or gates == auto.AUTO else read_gates(gates, gates_revision)
    given = {name: value for name, value in options.items() if value is not None}
    network: Any = load_model(folder, trust_remote_code=trust_remote_code, **given)
    if device_map is None:
        network.to(where)
    if rope_length is not None:
        vars(network)["_kvret_rope_length"] = rope_length
    tokenizer = read_tokenizer(folder, trust_remote_code, tokenizer_config)
    return _attach_any(network, checkpoint, (str(model), str(folder)), {}), tokenizer


def read_tokenizer(
    folder: Path, trust_remote_code: bool = False, options: dict[str, Any] | None = None
) -> Any:
    """A model folder's tokenizer; None where there is none."""
    if not any((folder / name).exists() for name in TOKENIZERS):
        check_needless(options, folder)
        return None
    given = {"trust_remote_code": trust_remote_code} | (options or {})
    with reading_tokenizer(folder):
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


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """transformers' loader with errors that say what to do; code in the folder is not run unless asked for.

    Raises:
        CheckpointError: the folder is damaged or incomplete.
        UnsupportedModelError: transformers does not know the architecture.
        MissingDependencyError: the model needs a package that is not there.
    """
    model_config(folder)
    try:
        options = {"trust_remote_code": False} | options
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
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
    from converters import load_any

    return load_any(resolve(gates, "gates", revision))


def attach(
    model: PreTrainedModel, gates: str | Path | GateCheckpoint | None = auto.AUTO, **options: Any
) -> PreTrainedModel:
    """As :func:`mlx_kvret.attach`."""
    check_eviction(options)
    # transformers sets it to what the model was loaded by, whatever its file says
    return _attach_any(model, gates, (str(model.name_or_path),) if model.name_or_path else (), options)


def _attach_any(
    model: PreTrainedModel,
    gates: str | Path | GateCheckpoint | None,
    names: tuple[str, ...],
    options: dict[str, Any],
) -> PreTrainedModel:
    """Attach with the gates that were given, or those that are known for a model of these names."""
    if gates != auto.AUTO:
        return _attach(model, None if gates is None else read_gates(gates), options)
    if options.get("policy", "learned") != "learned":
        return _attach(model, None, options)
    subject = Subject(model.config.to_dict(), names, lambda: _norms(model))
    attached: PreTrainedModel = auto.attach_best(
        subject, read_gates, lambda checkpoint: _attach(model, checkpoint, options)
    )
    return attached


def _norms(model: PreTrainedModel) -> dict[str, Array]:
    """The norms' weights by name, float32."""
    return {
        name: weight.detach().float().cpu().numpy()
        for name, weight in model.named_parameters()
        if is_norm(name) and weight.ndim == 1
    }


def _attach(
    model: PreTrainedModel, checkpoint: GateCheckpoint | None, options: dict[str, Any]
) -> PreTrainedModel:
    config = model.config.to_dict()
    owner, made = {"model": fingerprint(config)}, None
    if checkpoint is not None:
        check_base(checkpoint.config, config)
        made = from_checkpoint(checkpoint)
        owner["gates"] = tensors_id(checkpoint.tensors)
    if (before := hooks.attachment(model)) is not None:
        # a refusal leaves the model as it was
        if made is not None:
            before.layout.check_gates(made)
        own_eviction(before.layout.shape, None if made is None else made.config, options)
    hooks.remove(model)
    hooks.install(model, made, owner, options)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """As :func:`mlx_kvret.detach`."""
    hooks.remove(model)
    return model


def make_cache(
    model: PreTrainedModel, budget: int | str | None = None, buffer: int | None = None, **options: Any
) -> BoundedCache:
    """As :func:`mlx_kvret.make_cache`."""
    attached = hooks.attachment(model)
    if attached is None:
        learned = options.get("policy", "learned") == "learned"
        attached = hooks.attachment(attach(model, auto.AUTO if learned else None))
    assert attached is not None
    if budget is None and buffer is None and not options:
        return hooks.new_cache(model, attached, attached.eviction)
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


def full_cache(model: PreTrainedModel, cache: BoundedCache) -> tuple[int, int]:
    """KV heads of the bounded layers, and the bytes of a full cache that has seen as much as this one.

    Both are what is allocated. Layers that are not bounded count as they are.
    """
    attached = hooks.attachment(model)
    assert attached is not None
    shape = attached.layout.shape
    if cache.shared is None:
        return shape.heads, cache.nbytes
    others = cache.nbytes - cache.shared.nbytes
    return shape.heads, others + shape.full_nbytes(cache.seen)


def sampling(temp: float, top_p: float, seed: int | None) -> dict[str, Any]:
    """Options of :func:`stream_generate` that draw tokens with a temperature; 0 is greedy."""
    draw = sampler_of(Sampling(temp, top_p, seed))
    return {} if draw is None else {"sampler": draw}


def cache_shape(folder: Path) -> tuple[dict[str, Any], CacheShape]:
    """A model folder's config and what its bounded layers cache; no weights are read."""
    model_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with refusals(config.model_type), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except KVRetError:
        raise
    except Exception as error:  # model files take a config at its word
        raise UnsupportedModelError(f"transformers cannot load {folder}: {error}") from error
    shape = hooks.shape_of(model.eval())
    return config.to_dict(), shape
