"""A compaction's moves are MLX's scatter updates: they write into the pool, and no more than was evicted."""

import mlx.core as mx
import numpy as np
import pytest
from metal_host import installed

from mlx_kvret.mlx_backend.kernels import compaction_plan

from .cases import pool_with, uniform

LAYERS, NEWCOMERS = 4, 50


@pytest.fixture
def pool():
    made = pool_with([2000] * LAYERS, 64, 64)
    mx.eval(made.arrays())
    return made


def address(array):
    return np.array(array, copy=False).__array_interface__["data"][0]


def plan(pool, share):
    """Most entries stay, and so do as many newcomers as fit: which stay, and slots by layer."""
    keep = mx.random.bernoulli(share, (1, pool.capacity * pool.size)) & (pool.rows(pool.owner) < pool.heads)
    newcomers = mx.ones((1, LAYERS * NEWCOMERS), mx.bool_)
    both = mx.concatenate([keep, newcomers], axis=1)
    with installed():
        slots = compaction_plan.destinations(both, np.zeros(1, np.int32), keep.shape[1])
    mx.eval(keep, slots)
    return keep, slots.reshape(LAYERS, -1)


def fill(pool, slots):
    """As a compaction does, layer by layer; returns the most memory it took beyond what was there."""
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    for own in slots:
        pool.fill(own, uniform(NEWCOMERS, 64), uniform(NEWCOMERS, 64))
    mx.eval(pool.keys, pool.values)
    return mx.get_peak_memory() - base


def test_the_pool_stays_where_it_is(pool):
    _, slots = plan(pool, 0.9)
    before = address(pool.keys), address(pool.values)
    assert fill(pool, slots) < 0.2 * pool.keys.nbytes
    assert (address(pool.keys), address(pool.values)) == before


def test_a_pool_that_someone_holds_is_copied(pool):
    """Or the test above could not fail."""
    _, slots = plan(pool, 0.9)
    holder = pool.keys[:1]
    mx.eval(holder)
    assert fill(pool, slots) > pool.keys.nbytes


def test_no_more_is_written_than_was_evicted(pool):
    keep, slots = plan(pool, 0.99)
    before, spill = np.array(pool.keys), len(pool.keys) - 1
    fill(pool, slots)
    written = np.flatnonzero((np.array(pool.keys) != before).any(axis=1))
    evicted = np.flatnonzero(~np.array(keep[0]))
    assert set(written) - {spill} <= set(evicted)
    assert len(set(written) - {spill}) == min(len(evicted), slots.size)
