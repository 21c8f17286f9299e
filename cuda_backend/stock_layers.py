"""What transformers' own layers hold: those that do not compete, or all where nothing is evicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_kvret.core.shares import Share
from mlx_kvret.core.types import Ints

from .layer import tensors


def entries(layers: Sequence[Any], share: Share | None) -> int:
    """Entries over all ranks: one token in one KV head of one layer each."""
    shapes = [layer.keys.shape for layer in layers if layer.keys is not None]
    held = sum(rows * heads * tokens for rows, heads, tokens, _ in shapes)
    return held if share is None else share.of_whole(held)


def kept_positions(layers: Sequence[Any], share: Share | None) -> list[list[Ints]]:
    """For each layer, for each KV head, the positions of its entries."""
    if share is not None:
        whole = share.whole
        return [[np.arange(layers[0].get_seq_length())] * whole.kv_heads for _ in range(whole.layers)]
    heads = [0 if layer.keys is None else layer.keys.shape[1] for layer in layers]
    return [[np.arange(c.get_seq_length())] * n for c, n in zip(layers, heads, strict=True)]


def all_nbytes(cache: Any) -> int:
    """Bytes of all that a cache holds, over all ranks."""
    stock = (tensor.nbytes for layer in cache.stock for tensor in tensors(vars(layer)))
    others = sum(stock) if cache.rings is None else cache.rings.nbytes
    if cache.shared is not None:
        return others + cache.shared.nbytes
    return others if cache.stock_share is None else cache.stock_share.of_whole(others)
