"""The results file: one JSON object per cell of the grid, written whole after every cell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.files import whole_file
from ..core.options import number, of_type, whole
from ..core.reading import exactly, read_json_value
from ..errors import CheckpointError, ConfigError

FORMAT, VERSION = "kvret-eval", 1
_TEXTS = ("task", "budget", "method", "gates", "engine", "metric", "note")
_COUNTS = ("length", "chunk", "untouched")


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one task. ``gates`` is "" where none are used, ``length`` 0 for files.

    ``scores`` has one number per sample: for metric ``nll`` nats per token; ``entries`` is the mean number
    of tokens per head held in the end; ``chunk`` tokens were read at a time. In ``untouched`` samples nothing
    was evicted before the last thing scored. ``note`` says how gates were used other than they were
    validated.
    """

    task: str
    length: int
    budget: str
    method: str
    gates: str
    engine: str
    metric: str
    scores: tuple[float, ...]
    entries: float
    seconds: float
    chunk: int = 0
    untouched: int = 0
    note: str = ""

    @property
    def key(self) -> str:
        return cell_key(self.task, self.length, self.budget, self.method, self.gates)


def cell_key(task: str, length: int, budget: str, method: str, gates: str) -> str:
    """The name of a cell in the file."""
    return " | ".join((task, str(length), budget, method, gates))


@dataclass
class Results:
    """Cells by key, the settings that must be the same for all of them, and the options of the last run."""

    settings: dict[str, Any]
    gates: dict[str, str] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)
    path: Path | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def add(self, cell: Cell) -> None:
        """Take in a cell and write the file."""
        self.cells[cell.key] = cell
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        cells = {key: dataclasses.asdict(cell) for key, cell in self.cells.items()}
        head = {"format": FORMAT, "version": VERSION, "settings": self.settings, "gates": self.gates}
        head["run"] = self.run
        with whole_file(self.path, parents=True) as scratch:
            scratch.write_text(json.dumps(head | {"cells": cells}, indent=1) + "\n", encoding="utf-8")

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells.values())


def open_results(path: str | Path | None, settings: dict[str, Any], gates: dict[str, str]) -> Results:
    """The results in a file, to go on with, or new ones.

    Args:
        settings: must be those the file was made with.
        gates: a digest of the weights by label; new labels may be added, old ones must be the same.

    Raises:
        ConfigError: the file is something else or was made with other settings (names the difference).
    """
    path = None if path is None else Path(path).expanduser()
    if path is None or not path.exists():
        return Results(settings, gates, path=path)
    found = read_results(path)
    before, now = found.settings, settings
    names = sorted(before.keys() | now.keys())
    told = [f"{n} was {before.get(n)!r}, now {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
    told += [f"gates {n} have other weights" for n, i in gates.items() if found.gates.get(n, i) != i]
    if told:
        raise ConfigError(
            f"{path} was made with other settings: {', '.join(told)}; use those or another file"
        )
    found.gates |= gates
    return found


def read_results(path: str | Path) -> Results:
    """The results in a file.

    Raises:
        ConfigError: not a results file, another version, or damaged.
    """
    path = Path(path).expanduser()
    try:
        data = read_json_value(path)
    except CheckpointError as error:
        raise ConfigError(f"{path} is no results file: {error}; use another file") from error
    try:
        of_type("it", data, dict, "an object")
        if data.get("format") != FORMAT or not exactly(data.get("version"), VERSION):
            raise ConfigError(f"no results of version {VERSION}")
        for name in ("settings", "gates", "cells"):
            of_type(name, data.get(name), dict, "an object")
        of_type("run", data.setdefault("run", {}), dict, "an object")
        for label, digest in data["gates"].items():
            of_type(f"the digest of {label}", digest, str, "a text")
        cells = {key: _cell(key, fields) for key, fields in data["cells"].items()}
    except ConfigError as error:
        raise ConfigError(f"{path} is no results file: {error}; use another file") from error
    return Results(data["settings"], data["gates"], cells, path, data["run"])


def _cell(key: str, fields: Any) -> Cell:
    """A cell of a file.

    Raises:
        ConfigError: names the cell and what is wrong with it.
    """
    try:
        of_type("it", fields, dict, "an object")
        scores = fields.get("scores")
        if not isinstance(scores, list) or not scores:
            raise ConfigError("it has no scores")
        for score in scores:
            number("a score", score, "a finite number")
        for name in _TEXTS:
            of_type(name, fields.get(name, ""), str, "a text")
        for name in _COUNTS:
            whole(name, fields.get(name, 0), 0)
        for name in ("entries", "seconds"):
            number(name, fields.get(name), "a number of at least 0", 0)
        cell = Cell(**fields | {"scores": tuple(scores)})
        if cell.key != key:
            raise ConfigError(f"its fields are those of {cell.key!r}")
    except (ConfigError, TypeError) as error:
        # TypeError: missing or unknown fields
        raise ConfigError(f"cell {key!r}: {error}") from error
    return cell
