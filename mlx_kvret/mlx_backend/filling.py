"""Saved entries into an empty cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..core.snapshot import Snapshot
from .gates import to_array

if TYPE_CHECKING:
    from .bounded import Bounded


def fill(shared: Bounded, snapshot: Snapshot) -> None:
    """Put the newest tokens that every head holds into the rectangles, all others into the pool."""
    shape, pool = shared.shape, shared.pool
    tokens = snapshot.recent(max(1, shared.config.buffer))
    keys, values = to_array(snapshot.keys), to_array(snapshot.values)
    new = snapshot.position >= snapshot.seen - tokens
    index = mx.array(np.flatnonzero(new).astype(np.int32))
    rectangle = (shape.layers, 1, shape.kv_heads, tokens)
    new_keys = keys[index].reshape(*rectangle, shape.key_dim)
    new_values = values[index].reshape(*rectangle, shape.value_dim)
    log_beta = mx.array(snapshot.retention[new]).reshape(shape.layers, shape.kv_heads, tokens)
    learned = shared.config.policy == "learned"
    for layer, recent in enumerate(shared.recents):
        shared.seen[layer] = snapshot.seen
        if tokens:
            recent.restore(new_keys[layer], new_values[layer], log_beta[layer] if learned else None)

    kept = np.flatnonzero(~new)
    head = snapshot.head[kept]
    group = head // shared.size
    counts = shared.schedule.counts = np.bincount(group, minlength=pool.groups)
    if len(kept):
        pool.grow(int(-(-counts.max() // shared.size)), keys, values)
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        local = np.arange(len(kept)) - first[group]
        slots = mx.array((group * (pool.capacity * pool.size + 1) + local).astype(np.int32))
        index = mx.array(kept.astype(np.int32))
        pool.fill(slots, keys[index], values[index])
        pool.admit(
            mx.zeros((pool.groups, pool.capacity * pool.size), mx.bool_),
            slots,
            mx.ones(slots.shape, mx.bool_),
            mx.array(snapshot.retention[kept]),
            mx.array(snapshot.position[kept]),
            mx.array(head),
        )
    shared.evaluate()
