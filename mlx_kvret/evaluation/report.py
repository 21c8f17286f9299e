"""What a results file says: means with standard errors, who wins where, and a page of Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.files import whole_file
from ..core.types import Floats
from .methods import parse_fraction
from .results import Cell, Results
from .runner import FULL


@dataclass(frozen=True)
class Entry:
    """All cells of a method at one place of the grid, one for each set of gates.

    ``scores`` (gates, samples); ``mean`` over all; ``sample_error`` and ``seed_error`` are standard errors
    over samples (of their means over gates) and over gates (of their means over samples; 0 for a single one).
    """

    task: str
    length: int
    budget: str
    method: str
    metric: str
    scores: Floats
    entries: float

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    @property
    def sample_error(self) -> float:
        return standard_error(self.scores.mean(0))

    @property
    def seed_error(self) -> float:
        return standard_error(self.scores.mean(1)) if len(self.scores) > 1 else 0.0

    @property
    def error(self) -> float:
        """Both errors together."""
        return math.hypot(self.sample_error, self.seed_error)

    @property
    def text(self) -> str:
        """``0.953 ± 0.004``, or the perplexity where the metric is nats per token."""
        scale = math.exp(self.mean) if self.metric == "nll" else 1.0
        shown = scale if self.metric == "nll" else self.mean
        return _with_error(f"{shown:.3f}", self.error * scale, 3)

    def ahead(self, other: Entry) -> tuple[float, float]:
        """How much better than another entry at the same place, sample by sample, and its standard error."""
        sign = -1.0 if self.metric == "nll" else 1.0
        paired = self.scores.mean(0) - other.scores.mean(0)
        error = math.hypot(standard_error(paired), self.seed_error, other.seed_error)
        return sign * float(paired.mean()), error


@dataclass(frozen=True)
class Gain:
    """How much better a method is than ``other`` at the same place, paired over samples.

    ``mean`` is in nats per token for likelihoods, else in the score's unit; above 0 is better. ``error`` is
    its standard error over samples and sets of gates, NaN for a single sample, which has none.
    """

    task: str
    length: int
    budget: str
    method: str
    other: str
    metric: str
    mean: float
    error: float

    @property
    def text(self) -> str:
        return _with_error(f"{self.mean:+.4f}", self.error, 4)


def gains(found: Sequence[Entry], other: str) -> list[Gain]:
    """Every entry against that of method ``other`` at the same place; the full cache is at every budget."""
    by_place = {(e.task, e.length, e.budget, e.method): e for e in found}
    told = []
    for entry in found:
        budget = FULL if (entry.task, entry.length, FULL, other) in by_place else entry.budget
        against = by_place.get((entry.task, entry.length, budget, other))
        if against is not None and against is not entry and entry.budget != FULL:
            place = entry.task, entry.length, entry.budget, entry.method, other, entry.metric
            told.append(Gain(*place, *entry.ahead(against)))
    return told


def _with_error(shown: str, error: float, digits: int) -> str:
    """A single sample has no error; nothing is said then."""
    return shown if math.isnan(error) else f"{shown} ± {error:.{digits}f}"


def standard_error(values: Floats) -> float:
    """Of the mean; NaN for a single value, which has none."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def entries(results: Iterable[Cell]) -> list[Entry]:
    """Cells of the same place and method joined over gates, in order of appearance."""
    groups: dict[tuple[str, int, str, str, str], list[Cell]] = {}
    for cell in results:
        key = cell.task, cell.length, cell.budget, cell.method, _family(cell.gates)
        groups.setdefault(key, []).append(cell)
    return [
        Entry(
            *(task, length, budget, f"{method} ({family})" if family else method, cells[0].metric),
            np.array([cell.scores for cell in cells]),
            float(np.mean([cell.entries for cell in cells])),
        )
        for (task, length, budget, method, family), cells in groups.items()
    ]


def _family(gates: str) -> str:
    """Gates labelled ``shared/0``, ``shared/1``, ... are seeds of one training."""
    return gates.rpartition("/")[0]


def losses(found: Sequence[Entry], deviations: float = 2.0) -> list[str]:
    """Where learned methods are worse than the full cache or than another policy by more than this many
    standard errors: one sentence per place, the largest difference first, each method against whatever beats
    it by most. The oracle, which knows the answers, is left out."""
    told: dict[str, list[tuple[float, str]]] = {}
    for ours in found:
        worse = []
        for theirs in found if ours.method.startswith("learned") else ():
            same = (theirs.task, theirs.length) == (ours.task, ours.length)
            if not same or theirs.budget not in (ours.budget, FULL):
                continue
            if theirs.method.startswith(("learned", "oracle")):
                continue
            gain, error = ours.ahead(theirs)
            # a single sample has no error; then every difference is told
            if gain < -deviations * (0.0 if math.isnan(error) else error):
                worse.append((gain, f"{theirs.method} {theirs.text} ({gain:+.3f} ± {error:.3f})"))
        if worse:
            gain, most = min(worse)
            place = f"{ours.task}, {ours.length} tokens, budget {ours.budget}"
            told.setdefault(place, []).append((gain, f"{ours.method} {ours.text} is below {most}"))
    places = sorted(told.items(), key=lambda item: min(item[1]))
    return [f"{place}: {'; '.join(text for _, text in sorted(own))}" for place, own in places]


def table(found: Sequence[Entry], task: str, length: int) -> str:
    """Methods down, budgets across, as Markdown."""
    here = [e for e in found if (e.task, e.length) == (task, length)]
    budgets = sorted({e.budget for e in here} - {FULL}, key=_tokens, reverse=True)
    by_place = {(e.method, e.budget): e for e in here}
    methods = list(dict.fromkeys(e.method for e in here))
    rows = ["| " + " | ".join(["method", *budgets]) + " |", "|---" * (len(budgets) + 1) + "|"]
    for method in methods:
        full = by_place.get((method, FULL))
        cells = [full or by_place.get((method, budget)) for budget in budgets or [FULL]]
        rows.append("| " + " | ".join([method, *(e.text if e else "–" for e in cells)]) + " |")
    if not budgets:
        rows[:2] = ["| method | all entries |", "|---|---|"]
    return "\n".join(rows)


def markdown(results: Results, title: str = "Evaluation") -> str:
    """The page: settings, where learned eviction loses, then a table for every task and length."""
    found = entries(results)
    counts = sorted({e.scores.shape[1] for e in found})
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    lines = [f"# {title}", "", f"Settings: {settings}. Samples per cell: {', '.join(map(str, counts))}."]
    seeds = [len(e.scores) for e in found if e.method.startswith("learned")]
    if not seeds:
        lines += ["After ± stands the standard error over samples."]
    else:
        lines += [
            f"Learned methods have up to {max(seeds)} sets of gates; after ± stands the standard error over "
            "samples and sets of gates together.",
            "",
            "## Where learned eviction loses",
            "",
        ]
        lines += [f"- {sentence}" for sentence in losses(found)] or [
            "Nowhere in these tables by more than two standard errors, compared with the full cache and with "
            "every policy but the oracle."
        ]
    for task, length in dict.fromkeys((e.task, e.length) for e in found):
        name = "perplexity" if any(e.task == task and e.metric == "nll" for e in found) else "accuracy"
        where = f"{length:,} tokens" if length else "texts as they are"
        lines += ["", f"## {task}, {where}: {name}", "", table(found, task, length)]
    return "\n".join(lines) + "\n"


def summary(results: Results) -> dict[str, Any]:
    """The aggregated figures as JSON data."""
    rows = [
        {
            **{n: getattr(e, n) for n in ("task", "length", "budget", "method", "metric", "mean")},
            "error": _number(e.error),
            "sample_error": _number(e.sample_error),
            "seed_error": e.seed_error,
            "gates": len(e.scores),
            "samples": e.scores.shape[1],
            "entries_per_head": e.entries,
        }
        for e in entries(results)
    ]
    return {"settings": results.settings, "rows": rows}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tokens(budget: str) -> float:
    """For sorting: shares of the text first by size, then tokens."""
    top, bottom = parse_fraction(budget)
    return top / bottom if bottom else top / 1e12


def write_summary(results: Results, path: str | Path) -> None:
    """:func:`summary` as a JSON file."""
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(summary(results), indent=1) + "\n", encoding="utf-8")
