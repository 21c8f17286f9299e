"""A loaded model gets its hooks and gates, and makes bounded caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mlx_kvret.core.checkpoint import GateCheckpoint, check_base
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.request import check_eviction, own_eviction
from mlx_kvret.core.tensors import tensors_id
from mlx_kvret.core.types import Array
from mlx_kvret.zoo import auto
from mlx_kvret.zoo.identity import Subject, is_norm

from . import hooks
from .cache import BoundedCache
from .gates import from_checkpoint
from .loading import read_gates


def attach(
    model: PreTrainedModel, gates: str | Path | GateCheckpoint | None = auto.AUTO, **options: Any
) -> PreTrainedModel:
    """As :func:`mlx_kvret.attach`."""
    check_eviction(options)
    # transformers sets it to what the model was loaded by, whatever its file says
    return attach_any(model, gates, (str(model.name_or_path),) if model.name_or_path else (), options)


def attach_any(
    model: PreTrainedModel,
    gates: str | Path | GateCheckpoint | None,
    names: tuple[str, ...],
    options: dict[str, Any],
) -> PreTrainedModel:
    """Attach with the gates that were given, or those that are known for a model of these names."""
    if gates != auto.AUTO:
        return attach_these(model, None if gates is None else read_gates(gates), options)
    if options.get("policy", "learned") != "learned":
        return attach_these(model, None, options)
    subject = Subject(model.config.to_dict(), names, lambda: _norms(model))
    attached: PreTrainedModel = auto.attach_best(
        subject, read_gates, lambda checkpoint: attach_these(model, checkpoint, options)
    )
    return attached


def _norms(model: PreTrainedModel) -> dict[str, Array]:
    """The norms' weights by name, float32."""
    return {
        name: weight.detach().float().cpu().numpy()
        for name, weight in model.named_parameters()
        if is_norm(name) and weight.ndim == 1
    }


def attach_these(
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
        own_eviction(before.layout.whole, None if made is None else made.config, options)
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
    if hooks.attachment(model) is None:
        learned = options.get("policy", "learned") == "learned"
        attach(model, auto.AUTO if learned else None)
    sizes = {"budget": budget, "buffer": buffer}
    return hooks.asked_cache(model, {n: size for n, size in sizes.items() if size is not None} | options)
