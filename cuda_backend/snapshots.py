"""A bounded cache in the file format of :mod:`mlx_kvret.core.snapshot`, which both backends open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from mlx_kvret.core.bits import Packing
from mlx_kvret.core.packed import Packed
from mlx_kvret.core.saving import of_all
from mlx_kvret.core.snapshot import Snapshot
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.core.types import Ints
from mlx_kvret.errors import CheckpointError, UnsupportedFeatureError

from .cache import BoundedCache, BoundedKVCache
from .gates import CODES, to_tensor

if TYPE_CHECKING:
    from .attachment import Attachment
    from .bounded import Bounded
    from .probe import Layout
    from .row import Row


def take(cache: BoundedCache, notes: dict[str, str]) -> Snapshot:
    """What a cache holds, its entries in the order of their flat heads and positions.

    Raises:
        UnsupportedFeatureError: a batch, a cache that evicts nothing, or a kind of layer only torch knows.
    """
    shared = cache.shared
    if shared is None:
        raise UnsupportedFeatureError(
            "a cache of policy 'full' is transformers' own; save it with torch.save"
        )
    if len(shared.rows) != 1:
        raise UnsupportedFeatureError(
            f"a cache of {len(shared.rows)} sequences has no common file format; save cache.row(i) for each"
        )
    cache.settle()
    (row,), shape, device = shared.rows, shared.shape, shared.arena.device
    pool, seen, tokens = row.slab, row.seen, row.length
    used = pool.owner < pool.heads
    parts = [
        (pool.owner[used], pool.position[used], pool.retention[used], pool.keys[used], pool.values[used])
    ]
    if tokens:
        place = torch.arange(seen - tokens, seen, device=device)
        heads = torch.arange(shape.heads, device=device).view(shape.layers, -1)
        for layer, retention in enumerate(row.retention(tokens)):
            newest = (a[0].flatten(0, 1) for a in row.newest(layer, 0, tokens))
            spelled = heads[layer].repeat_interleave(tokens), place.repeat(shape.kv_heads)
            parts.append((*spelled, retention.flatten(), *newest))
    # a pool without slots has no widths yet
    dtype = pool.pool.like[0].dtype if pool.capacity else parts[-1][3].dtype
    none = (pool.retention.new_empty(0, n, dtype=dtype) for n in (shape.key_dim, shape.value_dim))
    packed = None if row.config.kv_bits is None else _packed(row, dtype)
    if packed is not None or pool.capacity == 0:
        parts[0] = (*parts[0][:3], next(none), next(none))
    head, position, retention, keys, values = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.from_numpy(np.lexsort((position.cpu().numpy(), head.cpu().numpy()))).to(device)
    counts: Ints = np.bincount(head.cpu().numpy(), minlength=shape.heads).astype(np.int32)
    extras = {
        i: _window_state(layer, seen)
        for i, layer in enumerate(cache.layers)
        if not isinstance(layer, BoundedKVCache)
    }
    places: Ints = position[order].cpu().numpy().astype(np.int32)
    scores = retention[order].float().cpu().numpy()
    # where there is a packed part, the window's are in that order
    held = [stored(a[order] if packed is None else a) for a in (keys, values)]
    if (share := cache.share) is not None:
        share.check_saved(bool(extras))
        given = share, counts, tokens, places, scores, held, packed
        counts, places, scores, held, packed = of_all(*given)
    whole = shared.arena.whole
    return Snapshot(
        model=shared.arena.owner["model"],
        gates=shared.arena.owner.get("gates", ""),
        eviction=row.config,
        seen=seen,
        counts=counts.reshape(whole.layers, whole.kv_heads),
        position=places,
        retention=scores,
        keys=held[0],
        values=held[1],
        extras=extras,
        notes=notes,
        pictures=row.pictures,
        packed=packed,
    )


def _packed(row: Row, dtype: torch.dtype) -> Packed:
    """The pool's rows of words, in the order of their heads and positions."""
    slab, shape = row.slab, row.arena.shape
    used = (slab.owner < slab.heads).cpu().numpy()
    owner, position = (a.cpu().numpy()[used] for a in (slab.owner, slab.position))
    order = np.lexsort((position, owner))

    def words(rows: torch.Tensor, form: Packing | None) -> Tensor:
        assert form is not None
        if not len(order):
            return Tensor("U32", np.zeros((0, form.words(dtype.itemsize)), np.uint32))
        return Tensor("U32", rows.cpu().numpy()[used][order].view(np.uint32))

    keys, values = words(slab.keys, slab.forms[0]), words(slab.values, slab.forms[1])
    return Packed.of(keys, values, row.length, row.config.kv_bits, (shape.key_dim, shape.value_dim))


def reopen(snapshot: Snapshot, made: Attachment, stock: list[Any]) -> BoundedCache:
    """A cache that goes on where the snapshot was taken; ``stock`` are the model's empty layers.

    Raises:
        ModelMismatchError: the snapshot belongs to another model or other gates, or its float type does not
            fit into the model's.
        CheckpointError: its shape is not the model's.
    """
    snapshot.check(made.owner["model"], made.owner.get("gates", ""), snapshot.eviction)
    snapshot = snapshot.cast(made.layout.dtype)
    cache = made.layout.bounded_cache(stock, snapshot.eviction, made.gates, made.owner)
    others = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, BoundedKVCache)]
    snapshot.check_shape(made.layout.whole, others)
    if made.layout.share is not None:
        made.layout.share.check_saved(bool(others))
    assert cache.shared is not None
    if snapshot.seen:
        _fill(cache.shared, snapshot)
    for i in others:
        _restore_window(cache.layers[i], snapshot, i, made.layout)
    return cache


def stored(tensor: torch.Tensor) -> Tensor:
    """A torch tensor as one to be stored, of the same type."""
    return Tensor.of(tensor.detach().float().cpu().numpy(), CODES[tensor.dtype])


def _fill(shared: Bounded, snapshot: Snapshot) -> None:
    """Put the newest tokens that every head holds into the window, all others into the pool."""
    (row,), shape, arena = shared.rows, shared.shape, shared.arena
    device, pool = arena.device, arena.pool
    tokens = snapshot.recent(max(1, row.config.buffer))
    keys, values = to_tensor(snapshot.keys).to(device), to_tensor(snapshot.values).to(device)
    retention = torch.from_numpy(snapshot.retention).to(device)
    before = snapshot.position < snapshot.seen - tokens
    in_groups = snapshot.head[before] // row.schedule.size
    row.schedule.counts = np.bincount(in_groups, minlength=len(row.schedule.counts)).astype(np.int64)
    # of the whole, as what is decided upon; but only this rank's heads are its own
    places, own_head, kept, packed = snapshot.position, snapshot.head, before, snapshot.packed
    words = [] if packed is None else [_words(rows, device) for rows in (packed.keys, packed.values)]
    if arena.share is not None:
        here, own_head = arena.share.own(snapshot.head)
        # with few bits keys and values are the window's alone
        held = torch.from_numpy(here if packed is None else here[~before]).to(device)
        keys, values, retention = keys[held], values[held], retention[torch.from_numpy(here).to(device)]
        words = [rows[torch.from_numpy(here[before]).to(device)] for rows in words]
        places, kept = places[here], kept[here]
    position, head = (torch.from_numpy(a).to(device) for a in (places, own_head))
    new = position >= snapshot.seen - tokens
    if packed is None:
        words = [keys[~new], values[~new]]
        keys, values = keys[new], values[new]
    row.seen, row.length, shared.places = snapshot.seen, tokens, snapshot.seen
    row.pictures = snapshot.pictures
    if tokens:
        window = (shape.layers, 1, shape.kv_heads, tokens)
        stored = [a.view(*window, a.shape[1]) for a in (keys, values)]
        arena.recent.reserve(tokens, arena.limit, stored[0][0], stored[1][0])
        for layer in range(shape.layers):
            for place, own in zip(row.newest(layer, 0, tokens), stored, strict=True):
                place.copy_(own[layer])
        if arena.gates is not None:
            row.scores(tokens).copy_(retention[new].view(shape.layers, shape.kv_heads, tokens))
            row.scored = tokens

    group = own_head[kept] // arena.size
    counts = np.bincount(group, minlength=pool.groups)
    if kept.any():
        pool.grow(int(-(-counts.max() // arena.size)), keys, values)
        local = np.arange(len(group)) - (np.cumsum(counts) - counts)[group]
        first, slabs = row.hold.index * pool.slots, [row.hold.index]
        slots = torch.from_numpy(first + group * (pool.capacity * pool.size + 1) + local).to(device)
        nothing = torch.zeros(pool.groups, pool.capacity * pool.size, dtype=torch.bool, device=device)
        everything = torch.ones(len(slots), dtype=torch.bool, device=device)
        pool.fill(slots, *words)
        new_accounts = retention[~new], position[~new], head[~new]
        pool.take(pool.admitted(nothing, slots, everything, *new_accounts, slabs), slabs)


def _words(stored: Tensor, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(stored.bits.view(np.int32)).to(device)


def _window_state(layer: Any, seen: int) -> dict[str, Tensor]:
    """Keys and values of a sliding-window layer, (H, n, D), oldest first."""
    if type(layer) is not DynamicSlidingWindowLayer:
        raise UnsupportedFeatureError(
            f"a cache with {type(layer).__name__} layers has no common file format; read the prompt again"
        )
    if not seen:
        return {}
    newest = {name: getattr(layer, name)[0, :, -seen:] for name in ("keys", "values")}
    if seen >= layer.sliding_window:
        # mlx-lm's ring has a place for the oldest token, which the next one overwrites unread
        newest = {name: torch.nn.functional.pad(a, (0, 0, 1, 0)) for name, a in newest.items()}
    return {name: stored(array) for name, array in newest.items()}


def _restore_window(layer: Any, snapshot: Snapshot, index: int, layout: Layout) -> None:
    known = layout.windows.get(index)
    if type(layer) is not DynamicSlidingWindowLayer or known is None:
        raise CheckpointError(
            f"layer {index} of the model keeps a {type(layer).__name__}, for which saved caches have no "
            "form; load the model the cache was saved with"
        )
    if not (state := snapshot.window(index, layer.sliding_window, known)):
        return
    newest = min(snapshot.seen, layer.sliding_window - 1)
    keys, values = (
        to_tensor(state[name])[None, :, state[name].shape[1] - newest :].to(layout.device)
        for name in ("keys", "values")
    )
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, snapshot.seen
