"""The results file: one JSON object per cell of the grid, written whole after every cell."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.files import whole_file
from ..errors import ConfigError

FORMAT, VERSION = "kvret-eval", 1


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
    """Cells by key, and the settings that must be the same for all of them."""

    settings: dict[str, Any]
    gates: dict[str, str] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)
    path: Path | None = None

    def add(self, cell: Cell) -> None:
        """Take in a cell and write the file."""
        self.cells[cell.key] = cell
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cells = {key: dataclasses.asdict(cell) for key, cell in self.cells.items()}
        head = {"format": FORMAT, "version": VERSION, "settings": self.settings, "gates": self.gates}
        with whole_file(self.path) as scratch:
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
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ConfigError(f"{path} is no results file of version {VERSION}; use another file")
        cells = [Cell(**cell | {"scores": tuple(cell["scores"])}) for cell in data["cells"].values()]
        whole = all(cell.scores and all(map(math.isfinite, cell.scores)) for cell in cells)
        settings, gates = dict(data["settings"]), dict(data["gates"])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no results file ({error}); use another file") from error
    if not whole:
        raise ConfigError(f"{path} holds cells without scores; remove it and run again")
    return Results(settings, gates, {cell.key: cell for cell in cells}, path)
