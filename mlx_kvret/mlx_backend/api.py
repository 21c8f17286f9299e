"""The MLX backend's side of the public functions in :mod:`mlx_kvret.api`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import load_model, load_tokenizer

from ..core.budget import CacheShape
from ..core.checkpoint import GateCheckpoint, check_base
from ..core.fingerprint import fingerprint
from ..core.loading import check_loading, check_needless, reading_tokenizer, tried
from ..core.model_folder import model_config as stored_config
from ..core.request import Sampling, check_eviction, eviction, own_eviction
from ..core.snapshot import read_snapshot, write_snapshot
from ..core.tensors import tensors_id
from ..core.types import Array
from ..errors import CheckpointError, KVRetError, UnsupportedModelError
from ..hub import resolve
from ..zoo import auto
from ..zoo.identity import Subject, is_norm
from . import hooks, rope, snapshots
from .adapters import add_adapter
from .cache import BoundedCache
from .gates import RetentionGates, from_checkpoint, to_tensor
from .generation import generate, stream_generate
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

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tiktoken.model")


# how MLX says that weights are not those of the model
_WEIGHTS = re.compile(r"Missing \d+ parameters|Received \d+ parameters not in model|Expected shape")
# options of transformers, and why they do nothing here
_TORCH_ONLY = {
    "device": "MLX computes on its default device; call mx.set_default_device",
    "dtype": "MLX computes in the type a model was saved in; convert it with `mlx_lm.convert --dtype`",
    "attn_implementation": "it is of transformers",
    "device_map": "it is of transformers",
    "quantization_config": "it is of transformers; convert the model with `mlx_lm.convert -q`",
}


def load(
    model: str | Path,
    gates: str | Path | GateCheckpoint | None = auto.AUTO,
    *,
    revision: str | None = None,
    gates_revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
    rope_length: int | None = None,
    adapter_path: str | Path | None = None,
    model_config: dict[str, Any] | None = None,
    get_model_classes: Callable[[dict[str, Any]], Any] | None = None,
    lazy: bool = False,
    strict: bool = True,
    **unknown: Any,
) -> tuple[nn.Module, Any]:
    """As :func:`mlx_kvret.load`.

    Args:
        adapter_path: folder or hub id of an adapter that mlx-lm has trained (LoRA, DoRA, full).
        model_config: entries of the model's ``config.json`` to replace.
        get_model_classes: from the config to mlx-lm's classes of a model and of its arguments.
        lazy: leave weights in the file until they are needed.
        strict: refuse weights that do not match the model.
    """
    check_loading(load, locals(), unknown, _TORCH_ONLY)
    folder = resolve(model, "model", revision, trust_remote_code)
    adapter = None if adapter_path is None else resolve(adapter_path, "adapter")
    searched = gates == auto.AUTO
    checkpoint = None if gates is None or searched else read_gates(gates, gates_revision)
    options: dict[str, Any] = {"lazy": lazy, "strict": strict, "trust_remote_code": trust_remote_code}
    if get_model_classes is not None:
        options["get_model_classes"] = get_model_classes
    network, config = load_network(folder, rope_length, model_config=model_config, **options)
    if adapter is not None:
        add_adapter(network, adapter)
    tokenizer = read_tokenizer(folder, config, trust_remote_code, tokenizer_config or {})
    if searched:
        _attach_best(network, config, (str(model), str(folder)), changed=adapter is not None)
    else:
        _attach(network, checkpoint, config)
    return network, tokenizer


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
    from converters import detect, load_any

    folder = resolve(gates, "gates", revision)
    if detect(folder) != "mlx":
        return load_any(folder)
    from converters.mlx_form import load_mlx_gates

    return load_mlx_gates(folder)


def attach(
    model: nn.Module, gates: str | Path | GateCheckpoint | None = auto.AUTO, **options: Any
) -> nn.Module:
    """As :func:`mlx_kvret.attach`."""
    check_eviction(options)
    args = getattr(model, "args", None)
    config = {name: value for name, value in vars(args).items() if value is not None} if args else {}
    rope.check(model)
    if gates == auto.AUTO and options.get("policy", "learned") == "learned":
        return _attach_best(model, config, (), options)
    checkpoint = None if gates is None or gates == auto.AUTO else read_gates(gates)
    return _attach(model, checkpoint, config, options)


def detach(model: nn.Module) -> nn.Module:
    """As :func:`mlx_kvret.detach`."""
    hooks.remove(model)
    return model


def make_cache(
    model: nn.Module, budget: int | str | None = None, buffer: int | None = None, **options: Any
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


def full_cache(model: nn.Module, cache: BoundedCache) -> tuple[int, int]:
    """KV heads of the bounded layers, and the bytes of a full cache that has seen as much as this one.

    Both are what is allocated: mlx-lm's caches grow by steps. Layers that are not bounded count as they are.
    """
    attached = hooks.attachment(model)
    assert attached is not None
    shape = attached.layout.shape
    if cache.shared is None:
        return shape.heads, cache.nbytes
    others = cache.nbytes - sum(layer.nbytes for layer in cache.competing)
    return shape.heads, others + shape.full_nbytes(-(-cache.seen // KVCache.step) * KVCache.step)


def cache_shape(folder: Path) -> tuple[dict[str, Any], CacheShape]:
    """A model folder's config and what its bounded layers cache; weights are mapped, not read."""
    model, config = load_network(folder, lazy=True)
    return config, hooks.install(model, None, {}, compute=False).layout.shape


def sampling(temp: float, top_p: float, seed: int | None) -> dict[str, Any]:
    """Options of :func:`stream_generate` that draw tokens with a temperature; 0 is greedy."""
    draw = sampler_of(Sampling(temp, top_p, seed))
    return {} if draw is None else {"sampler": draw}


def save_cache(
    model: nn.Module, cache: BoundedCache, path: str | Path, notes: dict[str, str] | None = None
) -> None:
    """As :func:`mlx_kvret.save_cache`."""
    write_snapshot(path, snapshots.take(cache, notes or {}))


def load_cache(model: nn.Module, path: str | Path) -> tuple[BoundedCache, dict[str, str]]:
    """As :func:`mlx_kvret.load_cache`."""
    snapshot = read_snapshot(path)
    return hooks.reopened_cache(model, snapshot), snapshot.notes


def _attach_best(
    model: nn.Module,
    config: dict[str, Any],
    names: tuple[str, ...],
    options: dict[str, Any] | None = None,
    changed: bool = False,
) -> nn.Module:
    """Attach with the gates that are known for the model, if there are any."""
    subject = Subject(config, names, lambda: _norms(model), changed)
    return auto.attach_best(subject, read_gates, lambda gates: _attach(model, gates, config, options))


def _norms(model: nn.Module) -> dict[str, Array]:
    """The norms' weights by name, float32."""
    weights: Any = tree_flatten(model.parameters())
    return {
        name: np.array(array.astype(mx.float32))
        for name, array in weights
        if is_norm(name) and array.ndim == 1
    }


def _attach(
    model: nn.Module,
    gates: GateCheckpoint | RetentionGates | None,
    config: dict[str, Any],
    options: dict[str, Any] | None = None,
) -> nn.Module:
    owner = {"model": fingerprint(config) + rope.mark(model)}
    if gates is not None:
        check_base(gates.config, config)
        gates = from_checkpoint(gates) if isinstance(gates, GateCheckpoint) else gates
        weights: Any = tree_flatten(gates.parameters())
        owner["gates"] = tensors_id({name: to_tensor(array) for name, array in weights})
    before = hooks.attachment(model)
    if before is not None:
        # a refusal leaves the model as it was
        if gates is not None:
            before.layout.check_gates(gates)
        own_eviction(before.layout.shape, None if gates is None else gates.config, options or {})
    hooks.remove(model)
    # gates and options do not change what the hooks give
    hooks.install(model, gates, owner, options, compute=before is None)
    return model
