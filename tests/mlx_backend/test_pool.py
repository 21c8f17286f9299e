"""Slots: an entry stays where it is until it is evicted, and updates happen in place."""

import gc
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from tiny import forward, gated, pieces, prompt

import mlx_kvret
from mlx_kvret.mlx_backend.pool import Pool
from mlx_kvret.mlx_backend.recent import Recent


def entries(pool):
    """What each occupied slot holds: (flat head, position), and the bytes of its key."""
    owner, position, keys = (np.array(a) for a in (pool.owner, pool.position, pool.keys))
    return {
        slot: (int(owner[slot]), int(position[slot]), keys[slot].tobytes())
        for slot in np.flatnonzero(owner < pool.heads).tolist()
    }


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
def test_an_entry_never_moves_and_moves_are_at_most_evictions(scope):
    model = gated()
    cache = mlx_kvret.make_cache(model, budget=8, buffer=4, scope=scope)
    pool, before, full = cache.shared.arena.pool, {}, False
    for chunk in pieces(prompt(90), [20, 1, 1, 1, 16, 1]):
        forward(model, chunk, cache)
        cache.settle()
        after = entries(pool)
        slot_of = {entry: slot for slot, entry in before.items()}
        stayed = [(slot_of[entry], slot) for slot, entry in after.items() if entry in slot_of]
        assert all(old == new for old, new in stayed)
        if full:
            moved, evicted = len(after) - len(stayed), len(before) - len(stayed)
            assert moved <= evicted
        before, full = after, len(after) == 8 * pool.heads
    assert full and len(np.unique(list(after))) == len(after)
    spill = np.arange(pool.groups) * (pool.capacity * pool.size + 1) + pool.capacity * pool.size
    assert not set(spill.tolist()) & set(after)


def test_the_lookup_lists_every_entry_once_by_head():
    pool = Pool(2, 3)
    pool.grow(4, mx.zeros((1, 2)), mx.zeros((1, 2)))
    owner = np.full(2 * 13, 6, np.int32)
    owner[[0, 5, 11]], owner[[14, 15, 24]] = [2, 0, 2], [5, 3, 5]
    pool.restore(4, [pool.keys, pool.values, pool.retention, pool.position, mx.array(owner)])
    offsets, table = pool.lookup.on_host(), np.array(pool.lookup.table)
    assert offsets.tolist() == [0, 1, 1, 3, 4, 4, 6] and len(table) == 24
    assert [sorted(table[a:b].tolist()) for a, b in pairwise(offsets)] == [
        [5], [], [0, 11], [15], [], [14, 24]
    ]  # fmt: skip


def address(array):
    mx.eval(array)
    return np.array(array, copy=False).__array_interface__["data"][0]


def test_filling_slots_happens_in_place():
    pool = Pool(1, 4)
    pool.grow(256, mx.zeros((1, 64)), mx.zeros((1, 64)))
    before = address(pool.keys), address(pool.values)
    for _ in range(3):
        pool.fill(mx.array([3, 900, 1024]), mx.ones((3, 64)), mx.ones((3, 64)))
        assert (address(pool.keys), address(pool.values)) == before


def test_adding_a_token_happens_in_place():
    recent = Recent(1, 64)
    token = mx.ones((1, 2, 1, 16))
    recent.append(0, 0, 0, token, token)
    before = address(recent.keys[0]), address(recent.values[0])
    for place in range(1, 41):
        recent.append(0, 0, place, token, token)
        mx.eval(recent.window(0, 0, place + 1))
        assert (address(recent.keys[0]), address(recent.values[0])) == before


@pytest.mark.parametrize("policy", ["learned", "recent"])
def test_decoding_copies_neither_pool_nor_recent_window(policy):
    model = gated(head_dim=128, num_hidden_layers=8)
    cache = mlx_kvret.make_cache(model, budget=512, buffer=8, policy=policy)
    for chunk in pieces(prompt(1024), [256]):
        forward(model, chunk, cache)
    forward(model, [1], cache)
    cache.settle()
    pool_bytes = cache.shared.arena.pool.keys.nbytes
    gc.collect(), mx.synchronize(), mx.clear_cache()
    addresses = address(cache.shared.arena.pool.keys), address(cache.shared.arena.pool.values)
    for token in range(20):  # two compactions at least
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        forward(model, [token], cache)
        cache.settle()
        mx.synchronize()
        assert mx.get_peak_memory() - held < pool_bytes
    assert (address(cache.shared.arena.pool.keys), address(cache.shared.arena.pool.values)) == addresses
