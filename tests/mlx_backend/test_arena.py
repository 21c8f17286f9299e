"""Bytes of an arena: what copies share is held once, and what rows leave behind is given back."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from tiny import forward, gated, prompt

import mlx_kvret
from mlx_kvret.core.slabs import Slabs

BUDGET, BUFFER = 32, 8


def make(model, tokens=0, seed=0):
    cache = mlx_kvret.make_cache(model, budget=BUDGET, buffer=BUFFER)
    for start in range(0, tokens, 16):
        forward(model, prompt(tokens, seed)[start : start + 16], cache)
    cache.settle()
    return cache


def decode(model, cache, count):
    for token in range(count):
        mx.eval(model(mx.array([[token % 60]] * cache.rows), cache=cache))
    cache.settle()


def test_a_hundred_copies_take_the_room_of_one_until_they_are_written_to():
    model = gated()
    cache = make(model, 100)
    arena, before = cache.shared.arena, cache.shared.arena.nbytes
    copies = [cache.copy() for _ in range(100)]
    assert arena.nbytes == before and arena.slabs.count == 1
    assert all(one.nbytes == cache.nbytes for one in copies), "a cache's own bytes count its slab"
    expected = forward(model, [1, 2], copy.deepcopy(cache))
    for one in copies[:2]:
        np.testing.assert_allclose(forward(model, [1, 2], one), expected, atol=1e-5)
    assert arena.slabs.count == 3 and arena.nbytes < 3.1 * before
    np.testing.assert_allclose(forward(model, [1, 2], cache), expected, atol=1e-5)
    del copies, one
    decode(model, cache, 2 * BUFFER)
    alone = make(model, 100)
    forward(model, [1, 2], alone)
    decode(model, alone, 2 * BUFFER)
    assert arena.slabs.count == 1 and arena.nbytes == alone.shared.arena.nbytes


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
def test_an_arena_of_rows_of_any_age_is_within_its_bound(rows):
    model = gated(head_dim=64)
    batch = make(model, 60)
    for row in range(1, rows):
        decode(model, batch, 3)
        batch.extend(make(model, 7 * (row % 5) + 1, seed=row))
    decode(model, batch, 40)
    shape = batch.shared.shape
    assert batch.shared.arena.nbytes <= 1.15 * rows * shape.nbytes(BUDGET, BUFFER)


def test_memory_is_where_it_was_after_many_joins_and_leaves():
    model, chance = gated(), np.random.default_rng(0)
    batch, ready = make(model, 50), make(model, 50, seed=1)
    for _ in range(300):
        if batch.rows < 6 and chance.random() < 0.5:
            batch.extend(copy.deepcopy(ready))
        elif batch.rows > 1:
            gone = int(chance.integers(1, batch.rows))
            batch.filter([row for row in range(batch.rows) if row != gone])
        assert batch.shared.arena.slabs.count <= 2 * batch.rows + 1
    batch.filter([0])
    decode(model, batch, 2 * BUFFER)
    alone = make(model, 50)
    decode(model, alone, 2 * BUFFER)
    assert batch.shared.arena.slabs.count == 1
    assert batch.shared.arena.nbytes == alone.shared.arena.nbytes


def test_idle_slabs_cost_a_token_nothing():
    """Counted, not timed: a pass looks at the slabs of its own rows only."""
    model, looked = gated(), []
    cache = make(model, 50)
    others = [cache.copy() for _ in range(20)]
    for one in [*others, cache]:
        forward(model, [1], one)
    assert cache.shared.arena.slabs.count >= 21
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slabs, "used", property(lambda self: looked.append(1) or list(range(21))))
        for token in range(BUFFER):
            forward(model, [token], cache)
    assert len(looked) == 1, "when the buffer is full"
