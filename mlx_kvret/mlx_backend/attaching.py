"""A loaded model gets its hooks and gates, and makes bounded caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..core.checkpoint import GateCheckpoint, check_base
from ..core.fingerprint import fingerprint
from ..core.request import check_eviction, eviction, own_eviction
from ..core.tensors import tensors_id
from ..core.types import Array
from ..zoo import auto
from ..zoo.identity import Subject, is_norm
from . import hooks, rope
from .cache import BoundedCache
from .gates import RetentionGates, from_checkpoint, to_tensor
from .loading import read_gates
from .vision import config_of, speaking


def attach(
    model: nn.Module, gates: str | Path | GateCheckpoint | None = auto.AUTO, **options: Any
) -> nn.Module:
    """As :func:`mlx_kvret.attach`."""
    check_eviction(options)
    config = config_of(speaking(model))
    rope.check(model)
    if gates == auto.AUTO and options.get("policy", "learned") == "learned":
        return attach_best_known(model, config, (), options)
    checkpoint = None if gates is None or gates == auto.AUTO else read_gates(gates)
    return attach_these(model, checkpoint, config, options)


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
    config = eviction(attached.layout.whole, budget, buffer, gates=attached.gate_config, **options)
    return hooks.new_cache(model, attached, config)


def attach_best_known(
    model: nn.Module,
    config: dict[str, Any],
    names: tuple[str, ...],
    options: dict[str, Any] | None = None,
    changed: bool = False,
) -> nn.Module:
    """Attach with the gates that are known for the model, if there are any."""
    subject = Subject(config, names, lambda: _norms(model), changed)
    return auto.attach_best(subject, read_gates, lambda gates: attach_these(model, gates, config, options))


def _norms(model: nn.Module) -> dict[str, Array]:
    """The norms' weights by name, float32."""
    weights: Any = tree_flatten(model.parameters())
    return {
        name: np.array(array.astype(mx.float32))
        for name, array in weights
        if is_norm(name) and array.ndim == 1
    }


def attach_these(
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
        own = own_eviction(before.layout.whole, None if gates is None else gates.config, options or {})
        before.layout.check_bits(own.kv_bits)
    hooks.remove(model)
    # gates and options do not change what the hooks give
    hooks.install(model, gates, owner, options, compute=before is None)
    return model
