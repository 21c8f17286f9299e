"""Rows of an arena: each is what it would be alone, memory follows those in use, and copies cost nothing."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from cross import rows
from torch.utils._python_dispatch import TorchDispatchMode

from mlx_kvret.core import schedule
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend import compaction
from mlx_kvret.cuda_backend.row import run_gates

from .bare import WORDS, Bare

HOST = Bare()
SMALL = EvictionConfig(budget=6, buffer=3)


def ready(tokens: int = 20, config: EvictionConfig = SMALL):
    cache = HOST.new(config)
    for token in range(tokens):
        HOST.read(cache, [[token]])
    cache.settle()
    return cache


def test_random_schedules_change_no_row() -> None:
    assert rows.run(HOST, 300) == []


def test_a_hundred_copies_take_the_memory_of_one() -> None:
    cache = ready()
    one, copies = cache.arena.nbytes, [cache.copy() for _ in range(100)]
    assert cache.arena.nbytes == one and all(copy.nbytes == one for copy in copies)
    before = HOST.kept(cache, 0)
    HOST.read(copies[3], [[1, 2]])
    assert cache.arena.slabs.used == [0, 1] and cache.arena.nbytes == 2 * one
    HOST.read(cache, [[3]])
    assert cache.arena.slabs.used == [0, 1, 2]
    assert [HOST.kept(copy, 0) for copy in copies if copy is not copies[3]] == [before] * 99


def test_memory_is_where_it_was_after_many_joins_and_leaves() -> None:
    chance, batch = random.Random(0), ready()
    single, most = batch.arena.nbytes, 0
    for _ in range(2000):
        if len(batch.rows) < 16 and (len(batch.rows) < 2 or chance.random() < 0.5):
            batch.extend(ready(5))
        else:
            batch.filter(sorted(chance.sample(range(len(batch.rows)), chance.randint(1, len(batch.rows)))))
        # what was grown for more is given back once less than half of it is used
        assert batch.arena.slabs.count <= max(2 * len(batch.rows), 1)
        most = max(most, len(batch.rows))
    assert most == 16
    batch.filter([0])
    gc.collect()
    assert batch.arena.nbytes == single


def test_sixteen_rows_take_little_more_than_sixteen_single_ones() -> None:
    batch = ready()
    single = batch.arena.nbytes
    for _ in range(15):
        batch.extend(ready())
    assert 16 * single <= batch.arena.nbytes <= 1.15 * 16 * single


def test_rows_of_other_budgets_and_of_another_rule() -> None:
    batch = ready()
    large = ready(40, EvictionConfig(budget=20, buffer=8))
    kept = HOST.kept(large, 0)
    batch.extend(large)
    assert HOST.kept(batch, 1) == kept and batch.arena.config.budget == 20 and not large.rows
    back = batch.extract(1)
    small = ready(5, EvictionConfig(budget=2, buffer=1))
    small.extend(back)
    assert HOST.kept(small, 1) == kept


def test_what_another_row_has_left_is_not_read() -> None:
    batch = ready()
    batch.extend(ready())
    batch.extend(ready())
    pool, recent = batch.arena.pool, batch.arena.recent
    pool.keys[1], pool.values[1] = torch.nan, torch.nan
    recent.keys[:, 1], recent.values[:, 1] = torch.nan, torch.nan
    batch.filter([0, 2])
    found = [HOST.read(batch, [[1], [2]]) for _ in range(4)]
    assert all(torch.from_numpy(out).isfinite().all() for both in found for out in both)
    batch.extend(ready(0))
    found = [HOST.read(batch, [[1], [2], [3]]) for _ in range(4)]
    assert all(torch.from_numpy(out).isfinite().all() for both in found for out in both)


@pytest.mark.parametrize("room", [schedule.TOGETHER, 1])
def test_rows_that_are_due_together_select_together(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TOGETHER", room)
    asked: list[int] = []

    def counted(score: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(len(score))
        return selected(score, *rest)

    selected = compaction.select
    monkeypatch.setattr(compaction, "select", counted)
    tokens = list(range(30))
    budgets = [(6, 3), (8, 3), (6, 3)]
    batch = HOST.new(EvictionConfig(*budgets[0]))
    for budget, buffer in budgets[1:]:
        batch.extend(HOST.new(EvictionConfig(budget, buffer)))
    alone = [HOST.new(EvictionConfig(*own)) for own in budgets]
    for token in tokens:
        HOST.read(batch, [[(token + row) % WORDS] for row in range(3)])
    batch.settle()
    together = asked.copy()
    asked.clear()
    for row, cache in enumerate(alone):
        for token in tokens:
            HOST.read(cache, [[(token + row) % WORDS]])
        assert HOST.kept(batch, row) == HOST.kept(cache, 0)
    assert sum(together) == sum(asked)
    # unless they are too many entries to be looked at at once
    assert (max(together), len(together) < len(asked)) == ((1, False) if room == 1 else (2, True))


def test_tokens_joined_of_several_rows_go_with_their_layer() -> None:
    batch, joined = HOST.new(SMALL), list[Any]()
    batch.extend(HOST.new(SMALL))
    batch.prepare([2, 1])
    batch.begin(2, 2)
    for layer in range(2):
        batch.reading.append(layer, torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, 5))
        joined.append(weakref.ref(batch.reading.chunks(layer).keys))
    assert [one() is None for one in joined] == [True, False]


class Worked(TorchDispatchMode):
    """Counts operations, but for views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, 0),
        ({"threshold": 1e-3}, 0),
        # scores and a scope that are worked out row by row
        ({"policy": "knorm", "scope": "global"}, 7),
        ({"policy": "keydiff", "scope": "layer"}, 19),
        ({"scope": "modality", "picture_share": 0.25}, 76),
    ],
)
def test_operations_of_a_compaction_by_rows(options: dict[str, Any], more: int) -> None:
    """With learned gates they are those of one row, whatever the number; else so many ``more`` for each."""
    counts, config = [], replace(SMALL, **options)
    for count in (1, 2, 5, 16):
        batch = HOST.new(config)
        for _ in range(count - 1):
            batch.extend(HOST.new(config))
        for token in range(9):
            HOST.read(batch, [[(token + row) % WORDS] for row in range(count)])
        run_gates(batch.rows)
        with Worked() as worked:
            batch.settle()
        counts.append(worked.count)
    one, two, *others = counts
    assert one > 30 and two <= one + 16 + more
    assert all(own <= two + more * (count - 2) for own, count in zip(others, (5, 16), strict=True))
