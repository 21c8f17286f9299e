"""A bounded cache in the file format of :mod:`mlx_kvret.core.snapshot`, which both backends open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..core.packed import Packed
from ..core.saving import of_all
from ..core.snapshot import Snapshot
from ..core.tensors import Tensor
from ..core.types import Ints
from ..errors import CheckpointError, UnsupportedFeatureError
from .cache import BoundedCache
from .candidates import retention_of
from .entry import BoundedKVCache
from .filling import fill
from .gates import to_array, to_tensor
from .kinds import is_kind
from .pool import Pool
from .row import Row

if TYPE_CHECKING:
    from .attachment import Attachment
    from .probe import Layout


def take(cache: BoundedCache, notes: dict[str, str]) -> Snapshot:
    """What a cache holds, its entries in the order of their flat heads and positions.

    Raises:
        UnsupportedFeatureError: the cache evicts nothing, or has a kind of layer that no other backend knows.
    """
    shared = cache.shared
    if shared is None:
        raise UnsupportedFeatureError(
            "a cache of policy 'full' is mlx-lm's own; save it with mlx_lm.models.cache.save_prompt_cache"
        )
    heads, share, whole = shared.own_positions(), shared.arena.share, shared.arena.whole
    row, pool = shared.row, shared.arena.pool.resized([shared.row.slab], 1)
    slots = _places(pool, row.length)
    keys, values = (_in_order(row, pool, name, slots) for name in ("keys", "values"))
    packed = None if pool.forms is None else _packed(row, pool, slots)
    newest = retention_of(row, row.length).reshape(-1) if row.length else mx.zeros((0,))
    retention = np.array(mx.concatenate([pool.retention, newest])[mx.array(slots)]).astype(np.float32)
    extras = {i: _window_state(c) for i, c in enumerate(cache) if not isinstance(c, BoundedKVCache)}
    counts: Ints = np.array([len(p) for p in heads], np.int32)
    position: Ints = np.concatenate(heads).astype(np.int32)
    stored = [to_tensor(keys), to_tensor(values)]
    if share is not None:
        share.check_saved(bool(extras))
        given = share, counts, row.length, position, retention, stored, packed
        counts, position, retention, stored, packed = of_all(*given)
    return Snapshot(
        model=shared.owner["model"],
        gates=shared.owner.get("gates", ""),
        eviction=shared.config,
        seen=row.seen,
        counts=counts.reshape(whole.layers, whole.kv_heads),
        position=position,
        retention=retention,
        keys=stored[0],
        values=stored[1],
        extras=extras,
        notes=notes,
        pictures=row.pictures,
        packed=packed,
    )


def reopen(snapshot: Snapshot, made: Attachment, stock: list[Any]) -> BoundedCache:
    """A cache that goes on where the snapshot was taken; ``stock`` are the model's empty entries.

    Raises:
        ModelMismatchError: the snapshot belongs to another model or other gates, or its float type does not
            fit into the model's.
        CheckpointError: its shape is not the model's.
    """
    snapshot.check(made.owner["model"], made.owner.get("gates", ""), snapshot.eviction)
    snapshot = snapshot.cast(made.layout.dtype)
    cache = made.layout.bounded_cache(stock, snapshot.eviction, made.gates, made.owner)
    others = [i for i, entry in enumerate(cache) if not isinstance(entry, BoundedKVCache)]
    snapshot.check_shape(made.layout.whole, others)
    if made.layout.share is not None:
        made.layout.share.check_saved(bool(others))
    assert cache.shared is not None
    if snapshot.seen:
        fill(cache.shared, snapshot)
    for layer in others:
        _restore_window(cache[layer], snapshot, layer, made.layout)
    return cache


def _places(pool: Pool, tokens: int) -> np.ndarray:
    """For each entry in the snapshot's order its index into the pool's slots and then the windows'."""
    table, offsets = np.array(pool.lookup.table), pool.lookup.on_host()
    position = np.array(pool.position)
    places = []
    for head in range(pool.heads):
        slots = table[offsets[head] : offsets[head + 1]]
        window = len(position) + head * tokens + np.arange(tokens)
        places += [slots[np.argsort(position[slots])], window]
    return np.concatenate(places).astype(np.int32)


def _in_order(row: Row, pool: Pool, name: str, places: np.ndarray) -> mx.array:
    """Keys or values of all entries, as floats; those of the window only where others are packed."""
    shape, held = row.arena.shape, getattr(pool, name)
    width = shape.key_dim if name == "keys" else shape.value_dim
    if not row.seen:
        # nothing has told the arrays their width yet
        return mx.zeros((0, width))
    packed = pool.forms is not None
    if not row.length:
        return mx.zeros((0, width), pool.dtype) if packed else held[mx.array(places)]
    windows = [row.window(layer)[name == "values"][0] for layer in range(shape.layers)]
    newest = mx.concatenate([w.reshape(-1, width) for w in windows])
    if packed:
        return newest
    kept = held if pool.capacity else mx.zeros((len(held), width), newest.dtype)
    return mx.concatenate([kept, newest])[mx.array(places)]


def _packed(row: Row, pool: Pool, places: np.ndarray) -> Packed:
    """Rows of the kept entries; the float type is that of :func:`_in_order`."""
    shape = row.arena.shape
    slots = mx.array(places[places < len(pool.position)])
    if pool.capacity:
        rows = [to_tensor(array[slots]) for array in (pool.keys, pool.values)]
    else:
        size = row.window(0)[0].dtype.size if row.length else 4
        assert pool.forms is not None
        rows = [Tensor.of(np.zeros((0, form.words(size))), "U32") for form in pool.forms]
    return Packed.of(rows[0], rows[1], row.length, row.config.kv_bits, (shape.key_dim, shape.value_dim))


def _window_state(entry: Any) -> dict[str, Any]:
    """Keys and values of a sliding-window layer, (H, n, D), oldest first."""
    if not is_kind(entry, "RotatingKVCache"):
        raise UnsupportedFeatureError(
            f"a cache with {type(entry).__name__} layers has no common file format; save it with "
            "mlx_lm.models.cache.save_prompt_cache"
        )
    if entry.keys is None:
        return {}
    return {name: to_tensor(entry._temporal_order(getattr(entry, name))[0]) for name in ("keys", "values")}


def _restore_window(entry: Any, snapshot: Snapshot, layer: int, layout: Layout) -> None:
    known = layout.others.get((layer, None))
    if not is_kind(entry, "RotatingKVCache") or known is None:
        raise CheckpointError(
            f"layer {layer} of the model keeps a {type(entry).__name__}, for which saved caches have no "
            "form; load the model the cache was saved with"
        )
    if state := snapshot.window(layer, entry.max_size, known.window):
        entry.keys, entry.values = (to_array(state[name])[None] for name in ("keys", "values"))
        entry.offset, entry._idx = snapshot.seen, entry.keys.shape[2]
        mx.eval(entry.keys, entry.values)  # for other threads
