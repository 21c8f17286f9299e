"""Snapshots that refer to the same pool: what they hold is what copies hold, in less memory, counted once."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.serving.backend import backend_for
from mlx_kvret.serving.batched import Batched
from mlx_kvret.serving.engine import OneByOne
from mlx_kvret.serving.prefixes import Prefix, Prefixes

from .running import OPTIONS, Asking, facts


@pytest.fixture(scope="module")
def backend(loaded):
    return backend_for(*loaded, OPTIONS)


def conversations(tokenizer, count, drawn):
    """Beginnings in common, of lengths at which pools differ or not; prompts and where snapshots stand."""
    system = tokenizer.encode("remember Stella salmon " + facts(40))
    found = []
    for at in range(count):
        ids = [*system]
        for _ in range(drawn.randrange(1, 4)):
            text = facts(drawn.randrange(1, 9), at) + " recall Ada"
            ids += tokenizer.encode(text, add_special_tokens=False)
            found.append((list(ids), frozenset({len(system), len(ids) - 3, len(ids) - 1})))
    return system, found


@pytest.mark.parametrize("engine", [Batched, OneByOne])
def test_what_is_shared_is_what_copies_hold(loaded, backend, engine):
    def made():
        return Batched(backend, 4) if engine is Batched else OneByOne(backend)

    sides = [Asking(backend, made(), shares=shares) for shares in (True, False)]
    system, asked = conversations(loaded[1], 6, random.Random(3))
    for ids, marks in asked:
        one, other = (side.answer(ids, marks, pinned={len(system)}) for side in sides)
        assert one == other
    stores = [side.scheduler.prefixes for side in sides]
    assert len(stores[0]) == len(stores[1]) > 20
    pools = {
        id(kept.cache.shared.arena.pool): kept.cache.shared.arena.pool for kept in stores[0]._kept.values()
    }
    assert len(pools) < 0.7 * len(stores[0])
    own = sum(kept.cache.nbytes - kept.cache.shared.arena.pool.nbytes for kept in stores[0]._kept.values())
    assert stores[0].nbytes == own + sum(pool.nbytes for pool in pools.values()) < 0.8 * stores[1].nbytes
    for key, kept in list(stores[0]._kept.items()):
        ours, theirs = (backend.take(store.kept(key)) for store in stores)
        assert ours.seen == theirs.seen == key.length
        for name in ("counts", "position", "retention"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("keys", "values"):
            assert np.array_equal(getattr(ours, name).bits, getattr(theirs, name).bits)
        # and what goes on from one leaves it alone
        again = stores[0].get(key)
        backend.read(again, ids[:40])
        assert backend.take(kept.cache).position.tolist() == ours.position.tolist()
    while len(stores[0]):
        stores[0]._push_out()
    assert stores[0].nbytes == 0 and not +stores[0]._referring


def test_another_s_snapshot_of_the_same_tokens_is_no_parent(loaded, backend):
    """Chunks of other lengths leave other entries; nothing may be taken from there."""
    ids = loaded[1].encode("remember Stella salmon " + facts(60) + " recall Stella")
    asking = Asking(backend, OneByOne(backend), chunk=32)
    asking.answer(ids, frozenset({100}))
    first = asking.scheduler.prefixes.kept(Prefix((), ids).key(100))
    assert first is not None
    asking.scheduler.chunk = 17
    # reads all of it, for the snapshot is longer than what it may take
    job = asking.job(ids[:100], frozenset({50}))
    asking.run()
    assert job.cached == 0
    asking.answer(ids, frozenset({100, 103}))
    alone = Asking(backend, OneByOne(backend), shares=False, chunk=17)
    alone.answer(ids[:100], frozenset({50}))
    found, expected = (
        backend.take(one.scheduler.prefixes.kept(Prefix((), ids).key(50))) for one in (asking, alone)
    )
    assert found.position.tolist() == expected.position.tolist()


@dataclass(eq=False)
class Cache:
    own: int
    pool: list[int] = field(default_factory=lambda: [10])

    @property
    def nbytes(self):
        return self.own + self.pool[0]


class Pools:
    def share(self, cache, parent):
        cache.pool = parent.pool

    def pool(self, cache):
        return id(cache.pool), cache.pool[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5), st.booleans()), max_size=25),
    st.integers(20, 80),
)
def test_bytes_are_those_of_what_is_there(puts, limit):
    prefix, kept, made = Prefix((), list(range(40))), Prefixes(limit, lambda c: c, None, Pools()), []
    for at, (own, parent, pinned) in enumerate(puts):
        given = made[-parent] if 0 < parent <= len(made) else None
        found = kept.put(prefix.key(at + 1), lambda own=own: Cache(own), pinned, given)
        assert found is None or found is kept.kept(prefix.key(at + 1))
        made += [found] if found is not None else []
        there = [one.cache for one in kept._kept.values()]
        pools = {id(cache.pool): cache.pool[0] for cache in there}
        assert kept.nbytes == sum(cache.own for cache in there) + sum(pools.values()) <= limit
