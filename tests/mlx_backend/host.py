"""The MLX backend as a host of rows: what stands under a model's layers, without a model."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from cross.rows import WORDS

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.mlx_backend.bounded import Bounded
from mlx_kvret.mlx_backend.forward import FEW
from mlx_kvret.mlx_backend.joining import admit

SHAPE = CacheShape(layers=2, kv_heads=2, key_dim=4, value_dim=3, itemsize=4, hidden_size=2)
GROUP = 2


def _table(seed, *shape):
    return np.random.default_rng(seed).normal(size=(WORDS, SHAPE.layers, *shape)).astype(np.float32)


KEYS, VALUES = _table(1, SHAPE.kv_heads, SHAPE.key_dim), _table(2, SHAPE.kv_heads, SHAPE.value_dim)
QUERIES = _table(3, SHAPE.kv_heads * GROUP, SHAPE.key_dim)
# few values, so that ties are common
LOG_BETA = -np.random.default_rng(4).integers(0, 4, (WORDS, SHAPE.layers, SHAPE.kv_heads)).astype(np.float32)
GATES = SimpleNamespace(log_beta=lambda layer, x: x, stacked=())


class OnMLX:
    """As :class:`cross.rows.Host`; log β, keys, values and queries are those of a token, by tables."""

    def new(self, config):
        return Bounded.single(SHAPE, config, {}, GATES if config.policy == "learned" else None)

    def read(self, cache, chunks):
        lengths = [len(chunk) for chunk in chunks]
        most = max(lengths)
        if not most:
            return [np.zeros((0, 1), np.float32) for _ in chunks]
        # what is padding shows if anyone looks at it
        tokens = np.array([[*chunk, *[-1] * (most - len(chunk))] for chunk in chunks])
        if cache.batch:
            cache.expect(lengths)
        cache.prepare(most, wait=most > FEW)
        reading, before = cache.begin(most)
        cache.passes.begin(before)
        cache.reading = reading
        out = [self._layer(reading, layer, tokens) for layer in range(SHAPE.layers)]
        cache.finish()
        cache.passes.commit()
        cache.expect(None)
        mx.eval(out, cache.arena.newest())
        rows = np.concatenate([np.array(one).transpose(0, 2, 1, 3) for one in out], axis=2)
        return [row[:n].reshape(n, row[0].size) for row, n in zip(rows, lengths, strict=True)]

    def _layer(self, reading, layer, tokens):
        def of(table):
            found = np.where((tokens < 0)[..., None, None], np.nan, table[tokens, layer])
            return mx.array(found.astype(np.float32)).transpose(0, 2, 1, 3)

        log_beta = np.where((tokens < 0)[..., None], np.nan, LOG_BETA[tokens, layer]).astype(np.float32)
        reading.observe(layer, mx.array(log_beta))
        reading.append(layer, of(KEYS), of(VALUES))
        return reading.attend(layer, of(QUERIES), 0.5, True)

    def kept(self, cache, row):
        return str([[head.tolist() for head in layer] for layer in cache.kept_positions(row)])

    def extend(self, cache, other):
        cache.extend(other)
        return cache

    def filter(self, cache, keep):
        cache.filter(keep)
        return cache

    def split(self, cache, which):
        twin = cache.copy()
        twin.filter(which)
        cache.filter([row for row in range(len(cache.rows)) if row not in which])
        return twin, cache

    def copy(self, cache):
        return cache.copy()

    def row(self, cache, index):
        return cache.extract(index)

    def own(self, cache):
        arena = cache.arena.like(len(cache.rows))
        cache.settle()
        return Bounded(arena, admit(arena, cache.rows), cache.batch)
