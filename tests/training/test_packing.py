"""Packing: every token once, documents apart, and the same batches from any saved position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.errors import DataError
from mlx_kvret.training.documents import Document
from mlx_kvret.training.packing import Packer, Position

sizes = st.lists(st.integers(2, 40), min_size=1, max_size=12)


def packer(lengths, length=16, rows=3, seed=0, epochs=1, skip=(), alone=False):
    """Document d consists of the tokens 100·d, 100·d + 1, …; every third of them is to be learnt."""

    def read(index):
        if index in skip:
            return None
        ids = np.arange(lengths[index], dtype=np.int32) + 100 * index
        return Document(ids, ids % 3 == 0, f"d{index}")

    return Packer(range(len(lengths)), read, length, rows, seed, epochs, alone)


def everything(source):
    batches = []
    while (batch := source.batch()) is not None:
        batches.append(batch)
    return batches


@given(sizes, st.integers(2, 20), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_token_once_with_its_neighbours(lengths, length, rows, alone):
    seen, learnt = [], 0
    source = packer(lengths, length, rows, alone=alone)
    for batch in everything(source):
        real = batch.position >= 0
        assert batch.ids.shape[0] == rows
        assert batch.ids.shape[1] <= length
        seen += batch.ids[real].tolist()
        learnt += int(batch.learn.sum())
        place = np.broadcast_to(np.arange(batch.ids.shape[1]), batch.ids.shape)
        assert (place - batch.starts == batch.position)[real].all()
        # a token that is learnt from is followed by the next one of its document
        for row, t in zip(*np.nonzero(batch.learn), strict=True):
            assert batch.ids[row, t + 1] == batch.ids[row, t] + 1
            assert batch.starts[row, t + 1] == batch.starts[row, t]
            assert batch.ids[row, t + 1] % 3 == 0
        if alone:
            assert (batch.starts[real] == 0).all()
    whole = [100 * d + i for d, n in enumerate(lengths) for i in range(n)]
    # a last piece of one token predicts nothing
    lone = [100 * d + n - 1 for d, n in enumerate(lengths) if n % length == 1 and n > 1]
    assert sorted(seen) == sorted(set(whole) - set(lone))
    firsts = [100 * d + i for d, n in enumerate(lengths) for i in range(0, n, length)]
    assert learnt == sum(token % 3 == 0 for token in set(whole) - set(firsts))
    assert source.progress() == 1


@given(sizes, st.integers(0, 8), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_goes_on_from_a_saved_position(lengths, stop, seed):
    whole = everything(packer(lengths, seed=seed, epochs=3))
    first = packer(lengths, seed=seed, epochs=3)
    for _ in range(min(stop, len(whole))):
        first.batch()
    second = packer(lengths, seed=seed, epochs=3)
    second.position = Position(*first.position)
    rest = everything(second)
    assert len(rest) == len(whole) - min(stop, len(whole))
    for mine, right in zip(rest, whole[stop:], strict=True):
        assert np.array_equal(mine.ids, right.ids)
        assert np.array_equal(mine.learn, right.learn)
        assert mine.where == right.where


def test_order_depends_on_seed_and_epoch():
    orders = []
    for seed in (0, 1):
        for epoch in (0, 1):
            source = packer([5] * 9, seed=seed, epochs=epoch + 1)
            source.position = Position(epoch)
            orders.append([name for batch in everything(source) for name in batch.where])
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == [f"d{i}" for i in range(9)] for order in orders)


def test_progress_within_one_long_document():
    source = packer([160], length=16, rows=1)
    shares = [source.progress()]
    while source.batch():
        shares.append(source.progress())
    assert shares == pytest.approx([i / 10 for i in range(11)])


def test_counts_cut_documents():
    assert [b.cut for b in everything(packer([40], length=16, rows=3))] == [2]


def test_skipped_documents():
    source = packer([5, 5, 5], skip={0, 2})
    assert [b.where for b in everything(source)] == [["d1"]]
    with pytest.raises(DataError, match="every record"):
        packer([5, 5], skip={0, 1}, epochs=None).batch()


def test_endless():
    source = packer([5], rows=1, epochs=None)
    assert [source.batch().where for _ in range(3)] == [["d0"] * 3] * 3
