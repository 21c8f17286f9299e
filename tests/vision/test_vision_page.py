"""The page of ``examples/vision.py``: all that the script evaluates finds its place on it."""

import sys
from pathlib import Path

import pytest

from mlx_kvret.evaluation import Cell, Grid, Results, parse_methods

pytest.importorskip("torch")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def vision(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shared = ("model", "package", "streams", "align", "train_gates", "vision")
    before = {name: sys.modules.pop(name, None) for name in shared}
    import vision

    yield vision
    # other examples have modules of the same names
    for name in shared:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]
    sys.path[:] = [path for path in sys.path if path != str(EXAMPLES / "train_vision")]


@pytest.mark.parametrize("tiny", (False, True))
def test_every_cell_is_shown(vision, tmp_path, tiny):
    from vision_page import write_page

    run = vision.Run(tmp_path, samples=4, seeds=2, steps=1, batch=2)
    found = {}
    for part in vision.parts(tiny):
        results = found.setdefault(part.file, Results({}))
        grid = Grid(part.tasks, part.lengths, part.budgets, tuple(parse_methods(part.methods)), 4)
        for job in grid.cells(part.labels or run.labels):
            # one budget for all is the best, but at the smallest, where a head of its own is
            best = job.method.name == (vision.KEPT if job.budget != "1/64" else "learned-head")
            scores = tuple(0.5 + 0.4 * best + 0.01 * i for i in range(4))
            place = (job.task, job.length, job.budget, job.method.name, job.gates, "reference", "accuracy")
            cell = Cell(*place, scores, 8.0, 60.0, part.chunk)
            results.cells[cell.key] = cell
    write_page(found, vision.validated(found["validation"]), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    for name in ("KeyDiff", "SnapKV", "sinks + window", "random", "per layer", "1 : 3", "3 : 1", "per head"):
        assert name in page
    assert page.count("above every other") == len(vision.FEW_BUDGETS if tiny else vision.BUDGETS) - 1 + 2
    assert page.count("**below**") == 2 and "nan" not in page
    assert "16 : 0" in page and "| | 8 | 38 | 64 |" in page


def test_gates_that_validate_best_come_first(vision):
    cells = Results({})
    for seed, score in enumerate((0.5, 0.9)):
        cell = Cell(
            "albums", 512, "1/4", "x", f"pictures/{seed}", "reference", "accuracy", (score,), 1.0, 1.0
        )
        cells.cells[cell.key] = cell
    assert list(vision.validated(cells)) == ["pictures/1", "pictures/0"]
