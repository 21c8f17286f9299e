"""Slabs of an arena: lowest free one first, shared ones told, freed with their holders, kept in order."""

import random

import pytest

from mlx_kvret.core.slabs import Hold, Slabs
from mlx_kvret.errors import CacheError


def test_a_slab_is_free_when_its_last_holder_is_gone():
    slabs = Slabs(2)
    first, second = slabs.take(), slabs.take()
    again = slabs.share(first)
    assert (first.index, second.index, again.index) == (0, 1, 0)
    assert slabs.shared(first) and not slabs.shared(second)
    del first
    assert not slabs.shared(again) and slabs.used == [0, 1]
    del again
    assert slabs.used == [1] and slabs.take().index == 0


def test_refusals():
    slabs = Slabs(1)
    hold = slabs.take()
    with pytest.raises(CacheError, match="all 1 slabs"):
        slabs.take()
    with pytest.raises(CacheError, match="slab 0 is taken"):
        slabs.move(slabs.share(hold), 0)
    with pytest.raises(CacheError, match="1 slabs are in use"):
        slabs.resize(0)


def test_a_moved_hold_leaves_the_others_where_they_are():
    slabs = Slabs(3)
    first = slabs.take()
    copied = slabs.share(first)
    slabs.move(copied, 2)
    assert (first.index, copied.index) == (0, 2)
    assert not slabs.shared(first) and not slabs.shared(copied)


def test_random_takes_shares_and_resizes():
    rng, slabs, held = random.Random(0), Slabs(4), list[tuple[Hold, object]]()
    contents: list[object] = [None] * 4
    for _ in range(2000):
        draw = rng.random()
        if draw < 0.35:
            if len(slabs.used) == slabs.count:
                source = slabs.resize(slabs.count + 2)
                contents = [contents[index] for index in source] + [None] * (slabs.count - len(source))
            hold, mark = slabs.take(), object()
            contents[hold.index] = mark
            held.append((hold, mark))
        elif draw < 0.5 and held:
            hold, mark = rng.choice(held)
            held.append((slabs.share(hold), mark))
        elif held:
            held.pop(rng.randrange(len(held)))
        if rng.random() < 0.05:
            source = slabs.resize(max(1, len(slabs.used)))
            contents = [contents[index] for index in source] + [None] * (slabs.count - len(source))
        assert all(contents[own.index] is mark for own, mark in held)
        assert slabs.used == sorted({own.index for own, _ in held})
        for own, mark in held:
            assert slabs.shared(own) == (sum(other is mark for _, other in held) > 1)
        hold = own = None  # names of the loop hold slabs too
