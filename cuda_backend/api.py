"""The torch backend's side of the public functions in :mod:`mlx_kvret.api`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.loading import check_loading, check_parallel
from mlx_kvret.core.model_folder import model_config
from mlx_kvret.core.picture_prompts import Asked
from mlx_kvret.core.ranks import Ranks
from mlx_kvret.core.sampling import Sampling, drawing
from mlx_kvret.core.saving import read_alike, write_once
from mlx_kvret.errors import (
    ConfigError,
    KVRetError,
    UnsupportedModelError,
)
from mlx_kvret.hub import resolve
from mlx_kvret.zoo import auto

from . import hooks, snapshots
from .attaching import attach, attach_any, detach, make_cache
from .attachment import share_of
from .cache import BoundedCache
from .compiling import want
from .generation import generate, stop_tokens, stream_generate, vocabulary
from .loading import checked_device, checked_dtype, load_model, model_class, read_gates, read_tokenizer
from .prefill import read_tokens, take_back
from .probe import refusals
from .ranks import split
from .sampling import alike, processors_of, sampler_of
from .seeing import processed as of_text

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

# options of mlx-lm, and why they do nothing here
_MLX_ONLY = {
    "adapter_path": "adapters of mlx-lm are loaded on MLX; merge one of PEFT into its model "
    "(merge_and_unload), save that and load it",
    "model_config": "it is of mlx-lm",
    "get_model_classes": "it is of mlx-lm",
    "lazy": "it is of mlx-lm",
    "text_only": "a model is what transformers opens its folder as; give it no pictures",
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
    compile: bool | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    parallel: str | None = None,
    **unknown: Any,
) -> tuple[PreTrainedModel, Any]:
    """As :func:`mlx_kvret.load`.

    Args:
        device: where the model goes, ``"cpu"`` unless given.
        dtype: of the model: ``"auto"`` (as it was saved), ``"bfloat16"``, ``torch.float16``, ...
        rope_length: tokens expected in all, for models whose RoPE depends on the length; their full length
            unless given.
        compile: fuse what lies between the attentions of a decoding step by torch.compile, on a GPU with
            Triton; takes a minute at the first answer. Where it fails steps go on without, with a warning.
        attn_implementation, device_map, quantization_config: as transformers' ``from_pretrained`` has them.
    """
    check_loading(load, locals(), unknown, _MLX_ONLY)
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map both say where the model goes; give one of them")
    check_parallel(parallel, {"device": device, "device_map": device_map})
    where = checked_device("cpu" if device is None else device)
    options = {
        "dtype": None if dtype is None else checked_dtype(dtype),
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
        "distributed_config": None if parallel is None else split(parallel),
    }
    folder = resolve(model, "model", revision, trust_remote_code)
    checkpoint = gates if gates is None or gates == auto.AUTO else read_gates(gates, gates_revision)
    given = {name: value for name, value in options.items() if value is not None}
    network: Any = load_model(folder, trust_remote_code=trust_remote_code, **given)
    if device_map is None and parallel is None:
        network.to(where)
    if compile:
        want(network, network.device)
    if rope_length is not None:
        vars(network)["_kvret_rope_length"] = rope_length
    tokenizer = read_tokenizer(folder, trust_remote_code, tokenizer_config)
    return attach_any(network, checkpoint, (str(model), str(folder)), {}), tokenizer


def save_cache(
    model: PreTrainedModel, cache: BoundedCache, path: str | Path, notes: dict[str, str] | None = None
) -> None:
    """As :func:`mlx_kvret.save_cache`."""
    write_once(path, snapshots.take(cache, notes or {}), cache.share)


def load_cache(model: PreTrainedModel, path: str | Path) -> tuple[BoundedCache, dict[str, str]]:
    """As :func:`mlx_kvret.load_cache`."""
    snapshot = read_alike(path, share_of(model))
    return hooks.reopened_cache(model, snapshot), snapshot.notes


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The processes that hold a model together; None if one does."""
    share = share_of(model)
    return None if share is None else share.ranks


def competing(model: PreTrainedModel) -> tuple[CacheShape, list[int]]:
    """The shape of what is bounded, over all ranks, and the places in the model of the layers that are."""
    attached = hooks.attachment(model)
    assert attached is not None
    layout = attached.layout
    return layout.whole, list(layout.places)


def full_cache(model: PreTrainedModel, cache: BoundedCache) -> tuple[int, int]:
    """KV heads of the bounded layers, and the bytes of a full cache that has seen as much as this one.

    Both are what is allocated. Layers that are not bounded count as they are.
    """
    attached = hooks.attachment(model)
    assert attached is not None
    shape = attached.layout.whole
    if cache.shared is None:
        return shape.heads, cache.nbytes
    others = cache.nbytes - cache.shared.nbytes
    return shape.heads, others + shape.full_nbytes(cache.seen)


def processed(
    model: PreTrainedModel, processor: Any, text: str, pictures: Sequence[Any]
) -> dict[str, torch.Tensor]:
    """What a vision-language model's processor makes of a rendered text, its begin token in it, and pictures.

    A prompt of :func:`generate`: ``input_ids`` (1, T), pixels and what goes with them.
    """
    made = of_text(model, processor, Asked(text, list(pictures)), first=False)
    return {"input_ids": made.ids, **made.given}


def sampling(model: PreTrainedModel, asked: Sampling) -> dict[str, Any]:
    """Options of :func:`stream_generate` that draw tokens as asked, for several calls: a seed is set once."""
    return drawing(alike(model, asked), vocabulary(model), sampler_of, processors_of)


def add_stop_tokens(model: PreTrainedModel, tokenizer: Any, tokens: Sequence[int]) -> None:
    """Have these tokens end a text too."""
    settings: Any = model.generation_config
    settings.eos_token_id = sorted(stop_tokens(model, tokenizer).union(tokens))


def cache_shape(folder: Path) -> tuple[dict[str, Any], CacheShape]:
    """A model folder's config and what its bounded layers cache; no weights are read."""
    network = model_class(model_config(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with refusals(config.model_type), torch.device("meta"):
            model = network.from_config(config, trust_remote_code=False)
    except KVRetError:
        raise
    except Exception as error:  # model files take a config at its word
        raise UnsupportedModelError(f"transformers cannot load {folder}: {error}") from error
    shape = hooks.shape_of(model.eval())
    return config.to_dict(), shape
