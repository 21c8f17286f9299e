"""Rows on the kernels: each keeps and says what it would alone, and all cost the launches of one."""

from collections import Counter

import numpy as np
import pytest
from cross.rows import schedule
from metal_host import installed
from mlx_backend.host import OnMLX

from mlx_kvret.core import schedule as schedules
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.mlx_backend import kernels
from mlx_kvret.mlx_backend.kernels.launch import Launch

HOST = OnMLX()


@pytest.fixture(autouse=True)
def _metal(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "metal")


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel is launched."""
    found: Counter[str] = Counter()

    def launch(self, inputs):
        found[self.kernel.name] += 1
        return stock(self, inputs)

    stock = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", launch)
    return found


@pytest.mark.parametrize("seed", [0, 3, 4, 7])
def test_a_row_is_as_it_would_be_alone(seed):
    with installed():
        assert schedule(HOST, seed, steps=8) == []


def batch_of(configs, tokens):
    """A batch, and caches of one row each, that have read the same."""
    chance = np.random.default_rng(0)
    alone = [HOST.new(config) for config in configs]
    batch = HOST.new(configs[0])
    for config in configs[1:]:
        batch.extend(HOST.new(config))
    for count in tokens:
        chunks = [chance.integers(0, 50, n).tolist() for n in np.broadcast_to(count, len(configs))]
        yield batch, alone, chunks


OPTIONS = [{}, {"scope": "head", "lookahead": 3}, {"scope": "layer", "threshold": 0.2}, {"min_per_head": 1}]


@pytest.mark.parametrize("options", [*OPTIONS, {"policy": "keydiff"}, {"policy": "recent"}], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_rows_that_are_due_together(options, count, launches):
    configs = [EvictionConfig(budget=3 + row, buffer=2 + row % 2, **options) for row in range(count)]
    with installed():
        for batch, alone, chunks in batch_of(
            configs, [range(2, 2 + count), range(9, 9 - count, -1), 1, 1, 1, 1]
        ):
            HOST.read(batch, chunks)
            batch.settle()
            for row, (cache, chunk) in enumerate(zip(alone, chunks, strict=True)):
                HOST.read(cache, [chunk])
                assert HOST.kept(batch, row) == HOST.kept(cache, 0)
    assert launches["candidates"]


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_a_compaction_of_all_rows_costs_the_launches_of_one(count, launches):
    configs = [EvictionConfig(budget=4 + row % 3, buffer=3) for row in range(count)]
    with installed():
        for batch, _, chunks in batch_of(configs, [8, 1, 1, 1]):
            HOST.read(batch, chunks)
        launches.clear()
        batch.settle()
    assert launches == {
        **dict.fromkeys(("rank_histogram", "rank_digit"), 3),
        **dict.fromkeys(
            ("candidates", "rank_verdict", "tie_limit", "keep_mask", "hole_filling", "head_counts"), 1
        ),
    }


def test_too_many_entries_select_in_turns(monkeypatch, launches):
    monkeypatch.setattr(schedules, "TOGETHER", 1)
    with installed():
        for batch, alone, chunks in batch_of([EvictionConfig(budget=4, buffer=3)] * 3, [8, 1, 1, 1]):
            HOST.read(batch, chunks)
            for cache, chunk in zip(alone, chunks, strict=True):
                HOST.read(cache, [chunk])
        launches.clear()
        batch.settle()
        assert launches["candidates"] == 3
        assert [HOST.kept(batch, row) for row in range(3)] == [HOST.kept(cache, 0) for cache in alone]
