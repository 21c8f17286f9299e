"""The grid: what is run, what is resumed, what is refused."""

import json
import math
from dataclasses import dataclass, field, replace

import pytest

from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Grid, Results, open_results, parse_methods, read_results, run_grid
from mlx_kvret.evaluation.chunks import Pace
from mlx_kvret.evaluation.engine import Outcome

METHODS = tuple(parse_methods(["full", "learned", "recent"]))
GRID = Grid(("facts", "bare"), (192, 256), ("1/4", "7"), METHODS, samples=3)


@dataclass
class Fake:
    """An engine whose scores tell what it was asked; breaks after ``patience`` cells."""

    name: str = "fake"
    patience: int = 10**9
    asked: list = field(default_factory=list)
    gates: str = ""
    score: float = 0.5
    pace: Pace = field(default_factory=Pace)

    def use_gates(self, gates):
        self.gates = gates

    def runs(self, method):
        return method.policy != "snapkv"

    def run(self, samples, method, budget):
        if len(self.asked) >= self.patience:
            raise KeyboardInterrupt
        self.asked.append((samples[0].tokens, method.name, budget, self.gates if method.learned else ""))
        return [Outcome(self.score * i, float(budget)) for i in range(len(samples))]


def run(engine, path=None, grid=GRID, gates=None, settings=None):
    gates = {"a/0": "A0", "a/1": "A1"} if gates is None else gates
    results = open_results(path, settings or {"model": "m"}, gates)
    return run_grid(grid, [engine], gates, results, progress=False)


def without_time(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    return {key: cell | {"seconds": 0} for key, cell in data["cells"].items()}


def test_every_cell_is_run_once_with_its_budget_and_gates():
    engine = Fake()
    results = run(engine)
    # per task and length: full, 2 budgets of recent, 2 of learned with each of 2 gates
    assert len(engine.asked) == len(set(results.cells)) == 2 * 2 * 7
    assert set(engine.asked) == {
        (length, method, budget, gates)
        for length in (192, 256)
        for method, budgets, labels in (
            ("full", (1,), ("",)),
            ("recent", (length // 4, 7), ("",)),
            ("learned", (length // 4, 7), ("A0", "A1")),
        )
        for budget in budgets
        for gates in labels
    }
    cell = results.cells["bare | 256 | 1/4 | learned | a/1"]
    assert (cell.scores, cell.entries, cell.engine, cell.metric) == (
        (0.0, 0.5, 1.0),
        64.0,
        "fake",
        "accuracy",
    )


def test_what_is_asked_for_twice_is_run_once():
    engine = Fake()
    run(engine, grid=replace(GRID, tasks=("facts",) * 2, lengths=(192, 192), budgets=("7", "7")))
    assert len(engine.asked) == 4


def test_a_broken_run_goes_on_where_it_was_left(tmp_path):
    whole, broken = tmp_path / "whole.json", tmp_path / "deep" / "broken.json"
    run(Fake(), whole)
    with pytest.raises(KeyboardInterrupt):
        run(Fake(patience=10), broken)
    assert len(without_time(broken)) == 10
    engine = Fake()
    run(engine, broken)
    assert len(engine.asked) == 28 - 10
    assert without_time(broken) == without_time(whole)
    again = Fake()
    run(again, broken)
    assert again.asked == []


def test_a_larger_grid_and_more_gates_only_add_cells(tmp_path):
    path, engine = tmp_path / "r.json", Fake()
    run(Fake(), path)
    wider = replace(GRID, budgets=("1/4", "7", "1/64"))
    run(engine, path, wider, gates={"a/0": "A0", "a/1": "A1", "b/0": "B0"})
    # 1/64 for recent and both old gates, three budgets for the new ones
    assert len(engine.asked) == 4 * (1 + 2 + 3)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"settings": {"model": "m", "seed": 1}}, "seed was None, now 1"),
        ({"settings": {"model": "n"}}, "model was 'm', now 'n'"),
        ({"gates": {"a/0": "other"}}, "gates a/0 have other weights"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    path = tmp_path / "r.json"
    run(Fake(), path)
    with pytest.raises(ConfigError, match=message):
        run(Fake(), path, **change)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "kvret-eval", "version": 9}', '{"format":'])
def test_another_file_is_not_overwritten(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="is no results file"):
        run(Fake(), path)
    assert path.read_text(encoding="utf-8") == content


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "r.json"
    made = run(Fake(), path)
    assert read_results(path).cells == made.cells and read_results(path).gates == made.gates


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda data, cell: data.update(version=1.0), "no results of version 1"),
        (lambda data, cell: data.update(settings=[]), r"settings is \[\]"),
        (lambda data, cell: data.update(gates={"a/0": 3}), "digest of a/0 is 3"),
        (lambda data, cell: data.update(cells=[1]), r"cells is \[1\]"),
        (lambda data, cell: data["cells"].update(more=3), "cell 'more': it is 3"),
        (lambda data, cell: cell.update(scores=[]), "cell .*: it has no scores"),
        (lambda data, cell: cell.update(scores=[True]), "cell .*: a score is True"),
        (lambda data, cell: cell.update(scores=["1"]), "cell .*: a score is '1'"),
        (lambda data, cell: cell.update(scores=[math.nan]), "NaN is no number"),
        (lambda data, cell: cell.update(entries=math.inf), "Infinity is no number"),
        (lambda data, cell: cell.update(seconds=-1), "cell .*: seconds is -1"),
        (lambda data, cell: cell.update(length=1.5), "cell .*: length is 1.5"),
        (lambda data, cell: cell.update(length=10**400), "beyond the range"),
        (lambda data, cell: cell.update(task=None), "cell .*: task is None"),
        (lambda data, cell: cell.update(colour="red"), "cell .*colour"),
        (lambda data, cell: cell.pop("engine"), "cell .*engine"),
        (lambda data, cell: cell.update(budget="1/2"), "cell .*: its fields are those of"),
    ],
)
def test_damaged_results_are_named_and_kept(tmp_path, edit, message):
    path = tmp_path / "r.json"
    run(Fake(), path)
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data, next(iter(data["cells"].values())))
    path.write_text(json.dumps(data), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"r\.json is no results file: .*{message}"):
        run(Fake(), path)
    assert path.read_bytes() == before


def test_what_cannot_be_run_is_refused_before_anything_is():
    engine = Fake()
    with pytest.raises(ConfigError, match="without gates"):
        run(engine, gates={})
    with pytest.raises(ConfigError, match="method snapkv looks at attention"):
        run(engine, grid=replace(GRID, methods=tuple(parse_methods(["snapkv"]))))
    for change, message in (
        ({"tasks": ("fact",)}, "task 'fact' is not known"),
        ({"budgets": ("2/1",)}, "budget '2/1' is neither"),
        ({"samples": 0}, "samples is 0"),
        ({"methods": ()}, "no methods were given"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(GRID, **change)
    assert engine.asked == []


def test_nan_is_no_result():
    with pytest.raises(ConfigError, match="sample 0 has no finite score"):
        run_grid(GRID, [Fake(score=math.nan)], {"a": "A"}, Results({}), progress=False)


@pytest.mark.parametrize(
    "text,message",
    [
        ("best", "method 'best' is not known"),
        ("learned:depth=1", "no option 'depth'"),
        ("recent:sinks=many", "sinks is 'many'; expected a value of type int"),
        ("recent:lookahead=2", "act on learned scores"),
        ("full:sinks=1", "the full cache has no options"),
        ("learned:scope=all", "scope is 'all'"),
        ("learned:kv_bits=5", "kv_bits is '5'"),
        ("snapkv:kv_bits=8", "store no bits"),
    ],
)
def test_wrong_methods_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_methods([text])
