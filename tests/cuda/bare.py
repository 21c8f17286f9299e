"""Rows of the torch backend without a model: a token's keys, values and queries are looked up in tables."""

from __future__ import annotations

import copy

import numpy as np
import torch

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend.attention import attend
from mlx_kvret.cuda_backend.bounded import Bounded
from mlx_kvret.cuda_backend.kernels.dispatch import attend_rows

SHAPE = CacheShape(layers=2, kv_heads=2, key_dim=3, value_dim=5, itemsize=4, hidden_size=4)
WORDS, GROUP = 50, 2


class Gates:
    """log β of a token, by its input; few different ones, so that ties are common."""

    stacked = (0, 1)

    def log_beta(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return -x[..., :2].abs().mul(2).round() / 2

    def log_betas(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_beta(0, x)


class Bare:
    """As :class:`cross.rows.Host`."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        widths = {"x": 4, "keys": 2 * 3, "values": 2 * 5, "queries": 2 * GROUP * 3}
        self._tables = {
            name: torch.cat([torch.randn(2, WORDS, n, generator=random), torch.full((2, 1, n), torch.nan)], 1)
            for name, n in widths.items()
        }

    def new(self, config: EvictionConfig) -> Bounded:
        gates = Gates() if config.policy == "learned" else None
        return Bounded.single(SHAPE, config, {}, torch.device("cpu"), gates)  # type: ignore[arg-type]

    def read(self, cache: Bounded, chunks: list[list[int]]) -> list[np.ndarray]:
        most = max(map(len, chunks))
        # what is padding shows if anyone looks at it
        ids = torch.tensor([[*chunk, *[WORDS] * (most - len(chunk))] for chunk in chunks])
        cache.prepare(list(map(len, chunks)))
        cache.begin(len(chunks), most)
        assert cache.reading is not None
        outs = []
        for layer in range(SHAPE.layers):
            got = {name: table[layer][ids] for name, table in self._tables.items()}
            keys, values, queries = (
                got[name].unflatten(2, (heads, -1)).transpose(1, 2)
                for name, heads in (("keys", 2), ("values", 2), ("queries", 2 * GROUP))
            )
            cache.reading.observe(layer, got["x"])
            cache.reading.append(layer, keys, values)
            if (rows := cache.reading.chunks(layer)) is not None:
                outs.append(attend_rows(queries, rows, 0.5))
                continue
            out = torch.full((len(chunks), 2 * GROUP, most, 5), torch.nan)
            for at, part, view in cache.reading.views(layer):
                out[at, :, part] = attend(queries[at, :, part], view, 0.5)
            outs.append(out)
        cache.commit()
        both = torch.cat(outs, 1).transpose(1, 2).flatten(2).numpy()
        return [own[: len(chunk)] for own, chunk in zip(both, chunks, strict=True)]

    def kept(self, cache: Bounded, row: int) -> str:
        return str([head.tolist() for layer in cache.kept_positions(row) for head in layer])

    def extend(self, cache: Bounded, other: Bounded) -> Bounded:
        cache.extend(other)
        return cache

    def filter(self, cache: Bounded, keep: list[int]) -> Bounded:
        cache.filter(keep)
        return cache

    def split(self, cache: Bounded, which: list[int]) -> tuple[Bounded, Bounded]:
        left = cache.copy()
        left.filter(which)
        cache.filter([at for at in range(len(cache.rows)) if at not in which])
        return left, cache

    def copy(self, cache: Bounded) -> Bounded:
        return cache.copy()

    def row(self, cache: Bounded, index: int) -> Bounded:
        return cache.extract(index)

    def own(self, cache: Bounded) -> Bounded:
        return copy.deepcopy(cache)
