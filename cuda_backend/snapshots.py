"""A bounded cache in the file format of :mod:`mlx_kvret.core.snapshot`, which both backends open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from mlx_kvret.core.snapshot import Snapshot
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import CheckpointError, UnsupportedFeatureError

from .cache import BoundedCache, BoundedKVCache
from .gates import to_tensor

if TYPE_CHECKING:
    from .attachment import Attachment
    from .bounded import Bounded
    from .probe import Layout

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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
    if shared.rows != 1:
        raise UnsupportedFeatureError(
            f"a cache of {shared.rows} sequences has no common file format; read each with a cache of its own"
        )
    shared.settle()
    pool, shape = shared.pool, shared.shape
    seen = shared.seen[0] - int(shared.schedule.padding[0])
    tokens = min(shared.recents[0].length, seen)
    used = pool.owner < pool.heads
    parts = [
        (pool.owner[used], pool.position[used], pool.retention[used], pool.keys[used], pool.values[used])
    ]
    if tokens:
        place = torch.arange(seen - tokens, seen, device=shared.device)
        for layer, recent in enumerate(shared.recents):
            head = torch.arange(layer * shape.kv_heads, (layer + 1) * shape.kv_heads, device=shared.device)
            retention = shared.retention_of(layer, recent.length, shared.seen[0] - recent.length)
            newest = slice(recent.length - tokens, None)
            parts.append(
                (
                    head.repeat_interleave(tokens),
                    place.repeat(shape.kv_heads),
                    retention[0, :, newest].flatten(),
                    recent.keys[0, :, newest].flatten(0, 1),
                    recent.values[0, :, newest].flatten(0, 1),
                )
            )
    if pool.capacity == 0:
        # a pool without slots has no widths yet
        dtype = parts[-1][3].dtype
        widths = (pool.keys.new_empty(0, width, dtype=dtype) for width in (shape.key_dim, shape.value_dim))
        parts[0] = (*parts[0][:3], next(widths), next(widths))
    head, position, retention, keys, values = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.from_numpy(np.lexsort((position.cpu().numpy(), head.cpu().numpy()))).to(shared.device)
    counts = np.bincount(head.cpu().numpy(), minlength=shape.heads)
    return Snapshot(
        model=shared.owner["model"],
        gates=shared.owner.get("gates", ""),
        eviction=shared.config,
        seen=seen,
        counts=counts.reshape(shape.layers, shape.kv_heads).astype(np.int32),
        position=position[order].cpu().numpy().astype(np.int32),
        retention=retention[order].float().cpu().numpy(),
        keys=stored(keys[order]),
        values=stored(values[order]),
        extras={
            i: _window_state(layer, seen)
            for i, layer in enumerate(cache.layers)
            if not isinstance(layer, BoundedKVCache)
        },
        notes=notes,
    )


def reopen(snapshot: Snapshot, made: Attachment, stock: list[Any]) -> BoundedCache:
    """A cache that goes on where the snapshot was taken; ``stock`` are the model's empty layers.

    Raises:
        ModelMismatchError: the snapshot belongs to another model or other gates.
        CheckpointError: its shape is not the model's.
    """
    snapshot.check(made.owner["model"], made.owner.get("gates", ""), snapshot.eviction)
    cache = made.layout.bounded_cache(stock, snapshot.eviction, made.gates, made.owner)
    others = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, BoundedKVCache)]
    snapshot.check_shape(made.layout.shape, others)
    assert cache.shared is not None
    if snapshot.seen:
        _fill(cache.shared, snapshot)
    for i in others:
        _restore_window(cache.layers[i], snapshot, i, made.layout)
    return cache


def stored(tensor: torch.Tensor) -> Tensor:
    """A torch tensor as one to be stored, of the same type."""
    return Tensor.of(tensor.detach().float().cpu().numpy(), _NAMES[tensor.dtype])


def _fill(shared: Bounded, snapshot: Snapshot) -> None:
    """Put the newest tokens that every head holds into the rectangles, all others into the pool."""
    shape, pool, device = shared.shape, shared.pool, shared.device
    tokens = snapshot.recent(max(1, shared.config.buffer))
    keys, values = to_tensor(snapshot.keys).to(device), to_tensor(snapshot.values).to(device)
    retention = torch.from_numpy(snapshot.retention).to(device)
    position, head = (torch.from_numpy(a).to(device) for a in (snapshot.position, snapshot.head))
    new = position >= snapshot.seen - tokens
    rectangle = (shape.layers, 1, shape.kv_heads, tokens)
    new_keys, new_values = (a[new].view(*rectangle, a.shape[1]) for a in (keys, values))
    log_beta = retention[new].view(rectangle)
    learned = shared.config.policy == "learned"
    for layer, recent in enumerate(shared.recents):
        shared.seen[layer] = snapshot.seen
        if tokens:
            recent.restore(new_keys[layer], new_values[layer], log_beta[layer] if learned else None)

    kept = snapshot.position < snapshot.seen - tokens
    group = snapshot.head[kept] // shared.size
    counts = np.bincount(group, minlength=pool.groups)
    shared.schedule.counts = counts.astype(np.int64)
    if kept.any():
        pool.grow(int(-(-counts.max() // shared.size)), keys, values)
        local = np.arange(len(group)) - (np.cumsum(counts) - counts)[group]
        slots = torch.from_numpy(group * (pool.capacity * pool.size + 1) + local).to(device)
        nothing = torch.zeros(pool.groups, pool.capacity * pool.size, dtype=torch.bool, device=device)
        everything = torch.ones(len(slots), dtype=torch.bool, device=device)
        pool.fill(slots, keys[~new], values[~new])
        pool.admit(nothing, slots, everything, retention[~new], position[~new], head[~new])


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
