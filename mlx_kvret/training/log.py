"""The CSV log of a run: one line per step."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path

from ..core.files import whole_file
from ..errors import TrainingError

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
            scratch.chmod(0o644)
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
    """The lines of a log as numbers; a last line broken off by a crash is left out."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    whole: Sequence[list[str]] = [row for row in rows[1:] if len(row) == len(COLUMNS)]
    return [dict(zip(COLUMNS, map(float, row), strict=True)) for row in whole]


def _short(value: float) -> str:
    return f"{value:.9g}"
