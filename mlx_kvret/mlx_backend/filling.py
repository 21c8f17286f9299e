"""Saved entries into an empty cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..core.snapshot import Snapshot
from .gates import to_array
from .observed import known

if TYPE_CHECKING:
    from .bounded import Bounded


def fill(shared: Bounded, snapshot: Snapshot) -> None:
    """Put the newest tokens that every head holds into the recent windows, all others into the pool."""
    row, arena = shared.row, shared.arena
    shape, pool, layers = shared.shape, arena.pool, range(shared.shape.layers)
    tokens = snapshot.recent(max(1, row.config.buffer))
    keys, values = to_array(snapshot.keys), to_array(snapshot.values)
    new = snapshot.position >= snapshot.seen - tokens
    in_groups = snapshot.head[~new] // row.schedule.size
    row.schedule.counts = np.bincount(in_groups, minlength=len(row.schedule.counts))
    here, own = snapshot.head >= 0, snapshot.head
    if arena.share is not None:
        # of the whole, as what is decided upon; but only this rank's heads are its own
        here, local = arena.share.own(snapshot.head)
        own = np.zeros(len(here), np.int32)
        own[here] = local
    late, kept, new = new, np.flatnonzero(here & ~new), here & new
    if snapshot.packed is None:
        index = mx.array(kept.astype(np.int32))
        old = keys[index], values[index]
        index = mx.array(np.flatnonzero(new).astype(np.int32))
        keys, values = keys[index], values[index]
    else:
        old = to_array(snapshot.packed.keys), to_array(snapshot.packed.values)
        if arena.share is not None:
            # of the packed entries, and of the newest ones, this rank's
            packed, newest = (mx.array(np.flatnonzero(here[part]).astype(np.int32)) for part in (~late, late))
            old = old[0][packed], old[1][packed]
            keys, values = keys[newest], values[newest]
    window = (shape.layers, 1, shape.kv_heads, tokens)
    row.seen, row.length, row.pictures = snapshot.seen, tokens, snapshot.pictures
    if tokens:
        new_keys = keys.reshape(*window, shape.key_dim)
        new_values = values.reshape(*window, shape.value_dim)
        for layer in layers:
            arena.recent.append(layer, row.slab, 0, new_keys[layer], new_values[layer])
        if row.config.policy == "learned":
            log_beta = mx.array(snapshot.retention[new])
            row.pieces = known(log_beta.reshape(shape.layers, shape.kv_heads, tokens))

    head = own[kept]
    group = head // pool.size
    counts = np.bincount(group, minlength=pool.groups)
    if len(kept):
        pool.grow(int(-(-counts.max() // pool.size)), keys, values)
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        local = np.arange(len(kept)) - first[group]
        slots = mx.array((group * (pool.capacity * pool.size + 1) + local).astype(np.int32))
        pool.fill(slots, *old)
        pool.admit(
            mx.zeros((pool.groups, pool.capacity * pool.size), mx.bool_),
            slots,
            mx.ones(slots.shape, mx.bool_),
            mx.array(snapshot.retention[kept]),
            mx.array(snapshot.position[kept]),
            mx.array(head),
        )
    arena.evaluate()
