"""Lines of a long run where there is no terminal."""

import pytest

from mlx_kvret.evaluation import progress as module
from mlx_kvret.evaluation.progress import EVERY, Progress


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def run(clock, cells, seconds, **options):
    lines = []
    with Progress(cells + 2, 2, line=lines.append, **options) as told:
        for i in range(cells):
            told.starts(f"cell {i}")
            clock[0] += seconds
            told.done()
    return lines


def test_a_line_now_and_then_says_how_far_it_is(clock):
    lines = run(clock, 10, EVERY / 2)
    assert lines[0] == "3 of 12 cells, 30 s gone, about 4 min 30 s left (cell 0)"
    assert lines[-1] == "12 of 12 cells, 5 min 00 s gone, about 0 s left (cell 9)"
    # every second cell, and none twice
    assert len(lines) == 6 and len(set(lines)) == 6


def test_quick_cells_are_not_told_one_by_one(clock):
    assert len(run(clock, 1000, EVERY / 1e4)) == 2


def test_a_run_that_breaks_says_what_was_done(clock):
    lines = []
    with pytest.raises(KeyboardInterrupt), Progress(5, 0, line=lines.append) as told:
        for i in range(3):
            told.starts(f"cell {i}")
            clock[0] += 3600
            if i == 2:
                raise KeyboardInterrupt
            told.done()
    assert lines[-1].startswith("2 of 5 cells, ") and "h" in lines[-1]


def test_quiet_runs_and_those_with_nothing_to_do_say_nothing(clock):
    assert run(clock, 5, 100, shown=False) == [] and run(clock, 0, 100) == []
