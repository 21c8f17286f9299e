"""Bounded caches in mlx-lm's prompt files: every layer's state, and how loaded layers are joined again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .core.budget import CacheShape
from .core.config import EvictionConfig
from .errors import CheckpointError

if TYPE_CHECKING:
    from .bounded import Bounded

FORMAT = "kvret-prompt-cache 1"


class Loaded:
    """A layer read from a prompt file; the model joins all of them when it first sees them together."""

    def __init__(self, state: list[Any]) -> None:
        try:
            self.header = json.loads(state[0])
            known = self.header["format"] == FORMAT
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise CheckpointError(
                "the prompt file holds no bounded cache that can be read; save it again"
            ) from error
        if not known:
            raise CheckpointError(
                f"the prompt file has format {self.header['format']!r}; this release reads {FORMAT!r}"
            )
        self.recent, self.pool = state[1:4], state[4:]

    @property
    def layer(self) -> int:
        return int(self.header["layer"])


def layer_state(shared: Bounded, layer: int) -> list[Any]:
    """Strings and arrays that restore one layer; the first layer's hold the pool."""
    shared.settle()
    header = {
        "format": FORMAT,
        "layer": layer,
        "owner": shared.owner,
        "shape": asdict(shared.shape),
        "eviction": shared.config.to_dict(),
        "seen": shared.seen[0],
        "counts": shared.schedule.counts.tolist(),
        "capacity": shared.pool.capacity,
    }
    recent = shared.recents[layer]
    new: list[Any] = [None, None, None]
    if recent.length:
        learned = shared.config.policy == "learned"
        new = [recent.keys, recent.values, recent.log_beta() if learned else None]
    return [json.dumps(header), *new, *(shared.pool.arrays() if layer == 0 else [])]


def restore(shared: Bounded, layers: list[Loaded]) -> None:
    """Fill an empty cache of the same shape and configuration with what was saved."""
    header = layers[0].header
    shared.schedule.counts = np.array(header["counts"], np.int64)
    shared.pool.restore(header["capacity"], layers[0].pool)
    for layer in layers:
        shared.seen[layer.layer] = header["seen"]
        keys, values, log_beta = layer.recent
        if keys is not None:
            shared.recents[layer.layer].restore(keys, values, log_beta)


def shape_and_config(header: dict[str, Any]) -> tuple[CacheShape, EvictionConfig]:
    """What a saved cache was made with."""
    return CacheShape(**header["shape"]), EvictionConfig.from_dict(header["eviction"])
