"""The MLX backend's side of the public functions in :mod:`mlx_kvret.api`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..core.budget import CacheShape
from ..core.checkpoint import GateCheckpoint
from ..core.installed import missing
from ..core.loading import check_loading, check_parallel
from ..core.model_folder import model_config as stored_config
from ..core.picture_prompts import Asked
from ..core.ranks import Ranks
from ..core.sampling import Sampling, drawing
from ..core.saving import read_alike, write_once
from ..core.vision import has_vision
from ..errors import ConfigError
from ..hub import resolve
from ..zoo import auto
from . import hooks, snapshots
from .adapters import add_adapter
from .attaching import attach, attach_best_known, attach_these, detach, make_cache
from .attachment import share_of
from .cache import BoundedCache
from .generation import generate, stream_generate, vocabulary
from .loading import TOKENIZERS, load_network, read_gates, read_tokenizer
from .loading_vision import load_seeing, read_processor
from .prefill import read_tokens, take_back
from .ranks import split
from .sampling import alike, processors_of, sampler_of
from .seeing import processed as of_text
from .seeing import reader_of
from .vision import is_vision

__all__ = [
    "attach",
    "detach",
    "generate",
    "load",
    "load_cache",
    "make_cache",
    "read_tokens",
    "save_cache",
    "stop_tokens",
    "stream_generate",
    "take_back",
]

# options of transformers, and why they do nothing here
_TORCH_ONLY = {
    "device": "MLX computes on its default device; call mx.set_default_device",
    "dtype": "MLX computes in the type a model was saved in; convert it with `mlx_lm.convert --dtype`",
    "attn_implementation": "it is of transformers",
    "device_map": "it is of transformers",
    "compile": "it is of torch",
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
    text_only: bool = False,
    parallel: str | None = None,
    **unknown: Any,
) -> tuple[nn.Module, Any]:
    """As :func:`mlx_kvret.load`; of a vision-language folder mlx-vlm's model, and its processor.

    Args:
        adapter_path: folder or hub id of an adapter that mlx-lm has trained (LoRA, DoRA, full).
        model_config: entries of the model's ``config.json`` to replace.
        get_model_classes: from the config to mlx-lm's classes of a model and of its arguments.
        lazy: leave weights in the file until they are needed.
        strict: refuse weights that do not match the model.
        text_only: of a vision-language folder mlx-lm's text half alone, which takes no pictures.
    """
    check_loading(load, locals(), unknown, _TORCH_ONLY)
    folder = resolve(model, "model", revision, trust_remote_code)
    stored = stored_config(folder)
    sees = has_vision(stored) and not text_only
    check_parallel(parallel, {"adapter_path": adapter_path, "a model that sees pictures": sees})
    if sees:
        given = {"adapter_path": adapter_path, "model_config": model_config, "rope_length": rope_length}
        _check_seeing(given | {"get_model_classes": get_model_classes}, stored)
    elif text_only and not has_vision(stored):
        raise ConfigError(f"text_only is given, and {folder} is a model of text; drop it")
    adapter = None if adapter_path is None else resolve(adapter_path, "adapter")
    searched = gates == auto.AUTO
    checkpoint = None if gates is None or searched else read_gates(gates, gates_revision)
    options: dict[str, Any] = {
        "lazy": lazy or parallel is not None,
        "strict": strict,
        "trust_remote_code": trust_remote_code,
    }
    if get_model_classes is not None:
        options["get_model_classes"] = get_model_classes
    if sees:
        network, config = load_seeing(folder, stored, lazy, strict, trust_remote_code), stored
    else:
        network, config = load_network(folder, rope_length, model_config=model_config, **options)
    if parallel is not None:
        split(network, parallel)
    if adapter is not None:
        add_adapter(network, adapter)
    if sees and any((folder / name).exists() for name in TOKENIZERS):
        tokenizer = read_processor(folder, network, trust_remote_code, tokenizer_config)
    else:
        tokenizer = read_tokenizer(folder, config, trust_remote_code, tokenizer_config or {})
    if searched:
        attach_best_known(network, config, (str(model), str(folder)), changed=adapter is not None)
    else:
        attach_these(network, checkpoint, config)
    return network, tokenizer


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that hold a model together; None if one does."""
    share = share_of(model)
    return None if share is None else share.ranks


def competing(model: nn.Module) -> tuple[CacheShape, list[int]]:
    """The shape of what is bounded, over all ranks, and the places in the model of the layers that are."""
    attached = hooks.attachment(model)
    assert attached is not None
    layout = attached.layout
    return layout.whole, list(layout.all_places)


def _check_seeing(given: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse options that mlx-vlm's loader has no use for."""
    if useless := [name for name, value in given.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(useless)} does not work with a vision-language model ({config.get('model_type')}); "
            "drop it, or give text_only=True for its text half"
        )


def full_cache(model: nn.Module, cache: BoundedCache) -> tuple[int, int]:
    """KV heads of the bounded layers, and the bytes of a full cache that has seen as much as this one.

    Both are what is allocated: mlx-lm's caches grow by steps. Layers that are not bounded count as they are.
    """
    attached = hooks.attachment(model)
    assert attached is not None
    shape = attached.layout.whole
    if cache.shared is None:
        return shape.heads, cache.nbytes
    others = cache.nbytes - sum(layer.nbytes for layer in cache.competing)
    return shape.heads, others + shape.full_nbytes(-(-cache.seen // KVCache.step) * KVCache.step)


def cache_shape(folder: Path) -> tuple[dict[str, Any], CacheShape]:
    """A model folder's config and what its bounded layers cache; weights are mapped, not read."""
    stored = stored_config(folder)
    if has_vision(stored) and not missing("vlm"):
        model, config = load_seeing(folder, stored, True, True, False), stored
    else:
        model, config = load_network(folder, lazy=True)
    return config, hooks.install(model, None, {}, compute=False).layout.shape


def processed(model: nn.Module, processor: Any, text: str, pictures: Sequence[Any]) -> dict[str, Any]:
    """What a vision-language model's processor makes of a rendered text, its begin token in it, and pictures.

    A prompt of :func:`generate`: ``input_ids`` (1, T), pixels and what goes with them.
    """
    return of_text(model, processor, Asked(text, list(pictures)), first=False).as_mapping()


def sampling(model: nn.Module, asked: Sampling) -> dict[str, Any]:
    """Options of :func:`stream_generate` that draw tokens as asked, for several calls: a seed is set once."""
    return drawing(alike(model, asked), vocabulary(model), sampler_of, processors_of)


def stop_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a text; mlx-lm's wrapper around the tokenizer has them all."""
    reader = reader_of(model, tokenizer) if is_vision(model) else tokenizer
    return {int(token) for token in getattr(reader, "eos_token_ids", ())}


def add_stop_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[int]) -> None:
    """Have these tokens end a text too."""
    reader = reader_of(model, tokenizer) if is_vision(model) else tokenizer
    for token in tokens:
        reader.add_eos_token(str(token))


def save_cache(
    model: nn.Module, cache: BoundedCache, path: str | Path, notes: dict[str, str] | None = None
) -> None:
    """As :func:`mlx_kvret.save_cache`."""
    snapshot = snapshots.take(hooks.checked_cache(model, cache), notes or {})
    write_once(path, snapshot, share_of(model))


def load_cache(model: nn.Module, path: str | Path) -> tuple[BoundedCache, dict[str, str]]:
    """As :func:`mlx_kvret.load_cache`."""
    snapshot = read_alike(path, share_of(model))
    return hooks.reopened_cache(model, snapshot), snapshot.notes
