"""The CSV log of a run: one line per step."""

from __future__ import annotations

import contextlib
import csv
import math
from pathlib import Path

from ..core.files import whole_file
from ..core.reading import read_bytes
from ..errors import CheckpointError, TrainingError

COLUMNS = (
    "step", "progress", "learning_rate", "loss", "kl", "cross_entropy", "capacity", "soft_size", "soft_share",
    "gradient_norm", "tokens", "cut", "tokens_per_second",
)  # fmt: skip


class CsvLog:
    """Appends lines; opened at a step, it first drops those of later steps, which are about to be repeated.

    Losses and soft sizes are those of :class:`.report.Losses`; ``cut`` counts documents that go on from
    another row without what they began with.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [row for row in read_log(path) if row["step"] <= step] if path.exists() else []
        with whole_file(path) as scratch, scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: _short(row[name]) for name in COLUMNS} for row in kept)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def write(self, values: dict[str, float]) -> None:
        """One line; the values of all COLUMNS."""
        try:
            self._writer.writerow([_short(values[name]) for name in COLUMNS])
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path}: {error.strerror}; make room and go on with --resume"
            ) from error

    def close(self) -> None:
        # what could not be flushed has been reported by write
        with contextlib.suppress(OSError):
            self._file.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log as numbers; a last line broken off by a crash is left out.

    Raises:
        CheckpointError: names the line that is damaged.
    """
    content = read_bytes(path)
    try:
        # a line without its end was broken off
        lines = content.decode("utf-8").split("\n")[:-1]
        rows = list(csv.reader(lines, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, the run goes on without") from error
    if rows and rows[0] != list(COLUMNS):
        raise CheckpointError(f"{path} has columns of another release; remove it, the run goes on without")
    return [_numbers(row, f"{path}:{number}") for number, row in enumerate(rows[1:], 2)]


def _numbers(row: list[str], where: str) -> dict[str, float]:
    try:
        found = dict(zip(COLUMNS, map(float, row), strict=True))
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged ({error}); remove the line") from error
    if not all(map(math.isfinite, found.values())):
        raise CheckpointError(f"{where} is damaged (not all of it are finite numbers); remove the line")
    return found


def _short(value: float) -> str:
    return f"{value:.9g}"
