"""The numpy oracle beside a running cache: the same entries, evicted by ``core.eviction.select``."""

import contextlib
import copy

import mlx.core as mx
import numpy as np

from mlx_kvret.core.eviction import due_groups, select
from mlx_kvret.core.policies import knorm_score, random_score, recent_score
from mlx_kvret.core.retention import retention_score
from mlx_kvret.mlx_backend.reading import Reading
from mlx_kvret.mlx_backend.selection import keydiff_score


class Oracle:
    """What a cache should hold; ``log_beta`` and ``keys`` list each layer's parts (H, T) and (H, T, D)."""

    def __init__(self, shape, config):
        self.shape, self.config = shape, config
        self.heads = shape.layers * shape.kv_heads
        self.log_beta = [[] for _ in range(shape.layers)]
        self.keys = [[] for _ in range(shape.layers)]
        self.position, self.head = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.seen = self.compactions = 0

    def step(self, count):
        """``count`` tokens have passed through the model."""
        new = np.arange(self.seen, self.seen + count)
        self.position = np.r_[self.position, np.tile(new, self.heads)]
        self.head = np.r_[self.head, np.repeat(np.arange(self.heads), count)]
        self.seen += count
        rule = self.config, self.shape.layers, self.shape.kv_heads
        counts = np.bincount(self.head, minlength=self.heads)
        if not due_groups(counts, *rule).any():
            return
        self.compactions += 1
        keep = select(self.score(), self.position, self.head, self.seen, *rule)
        self.position, self.head = self.position[keep], self.head[keep]

    def score(self):
        policy, place = self.config.policy, (self.head, self.position)
        if policy == "learned":
            log_beta = np.concatenate([np.concatenate(layer, axis=1) for layer in self.log_beta])
            return retention_score(log_beta[place], self.position, self.seen, self.config.lookahead)
        if policy == "recent":
            return recent_score(self.position)
        if policy == "random":
            return random_score(self.position, self.head, self.config.policy_seed)
        keys = np.concatenate([np.concatenate(layer, axis=1) for layer in self.keys])[place]
        if policy == "knorm":
            return knorm_score(keys)
        # two keys of a head are equally near to their mean: rounding decides, so the device's own is taken
        return np.array(keydiff_score(mx.array(keys), mx.array(self.head), self.heads))

    def kept_positions(self):
        heads = [np.sort(self.position[self.head == head]) for head in range(self.heads)]
        size = self.shape.kv_heads
        return [heads[i : i + size] for i in range(0, self.heads, size)]

    def check(self, cache):
        """The cache holds exactly the oracle's entries, within its bound."""
        config = self.config
        assert cache.seen == self.seen
        assert cache.entries == len(self.position) <= (config.budget + config.buffer) * self.heads
        for ours, theirs in zip(cache.kept_positions(), self.kept_positions(), strict=True):
            for found, expected in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(found, expected)

    def fork(self):
        return copy.deepcopy(self)


@contextlib.contextmanager
def recording(monkeypatch):
    """Yields ``watch(cache, oracle)``: from then on the oracle is told the log β and keys of that cache."""
    watched = {}
    observe, append = Reading.observe, Reading.append

    def note_log_beta(self, layer, x):
        observe(self, layer, x)
        if id(self.rows[0]) in watched and self.observed is not None:
            _, oracle = watched[id(self.rows[0])]
            oracle.log_beta[layer].append(np.array(self.arena.gate(layer, x[0]).T))

    def note_keys(self, layer, keys, values):
        if id(self.rows[0]) in watched:
            _, oracle = watched[id(self.rows[0])]
            oracle.keys[layer].append(np.array(keys[0]))
        return append(self, layer, keys, values)

    def watch(cache, oracle):
        watched[id(cache.shared.row)] = cache.shared.row, oracle

    with monkeypatch.context() as patch:
        patch.setattr(Reading, "observe", note_log_beta)
        patch.setattr(Reading, "append", note_keys)
        yield watch
