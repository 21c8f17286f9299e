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
    ``chunk``, ``untouched`` and ``notes`` are those of the cells.
    """

    task: str
    length: int
    budget: str
    method: str
    metric: str
    scores: Floats
    entries: float
    chunk: int = 0
    untouched: int = 0
    notes: tuple[str, ...] = ()

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
    def mark(self) -> str:
        """Behind figures of gates that were used other than they were validated."""
        return " †" if self.notes else ""

    @property
    def text(self) -> str:
        """``0.953 ± 0.004``, or the perplexity where the metric is nats per token."""
        scale = math.exp(self.mean) if self.metric == "nll" else 1.0
        shown = scale if self.metric == "nll" else self.mean
        return _with_error(f"{shown:.3f}", self.error * scale, 3) + self.mark

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
    mark: str = ""

    @property
    def shown(self) -> str:
        """``+0.0034 ± 0.0010``: nats above the other's, or the score above the other's."""
        likelihood, digits = self.metric == "nll", 4 if self.metric == "nll" else 3
        return (
            _with_error(f"{-self.mean if likelihood else self.mean:+.{digits}f}", self.error, digits)
            + self.mark
        )


def gains(found: Sequence[Entry], other: str) -> list[Gain]:
    """Every entry against that of method ``other`` at the same place; the full cache is at every budget."""
    by_place = {(e.task, e.length, e.budget, e.method): e for e in found}
    told = []
    for entry in found:
        budget = FULL if (entry.task, entry.length, FULL, other) in by_place else entry.budget
        against = by_place.get((entry.task, entry.length, budget, other))
        if against is not None and against is not entry and entry.budget != FULL:
            place = entry.task, entry.length, entry.budget, entry.method, other, entry.metric
            told.append(Gain(*place, *entry.ahead(against), entry.mark))
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
            max(cell.chunk for cell in cells),
            max(cell.untouched for cell in cells),
            tuple(dict.fromkeys(cell.note for cell in cells if cell.note)),
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
                told_gain = _with_error(f"{gain:+.3f}", error, 3)
                worse.append((gain, f"{theirs.method} {theirs.text} ({told_gain})"))
        if worse:
            gain, most = min(worse)
            place = f"{ours.task}, {ours.length} tokens, budget {ours.budget}"
            told.setdefault(place, []).append((gain, f"{ours.method} {ours.text} is below {most}"))
    places = sorted(told.items(), key=lambda item: min(item[1]))
    return [f"{place}: {'; '.join(text for _, text in sorted(own))}" for place, own in places]


def table(found: Sequence[Entry], task: str, length: int) -> str:
    """Methods down, budgets across, as Markdown."""
    here = [e for e in found if (e.task, e.length) == (task, length)]
    # the full cache is the same at every budget
    return _grid({(e.method, e.budget): e.text for e in here})


def paired_table(found: Sequence[Entry], task: str, length: int, other: str) -> str:
    """Differences to method ``other``, paired over samples, as Markdown; "" if there are none.

    Of likelihoods it shows nats per token above the other's, of which fewer are better, else scores.
    """
    here = [gain for gain in gains(found, other) if (gain.task, gain.length) == (task, length)]
    return _grid({(gain.method, gain.budget): gain.shown for gain in here}) if here else ""


def _grid(texts: dict[tuple[str, str], str]) -> str:
    budgets = sorted({budget for _, budget in texts} - {FULL}, key=_tokens, reverse=True)
    rows = ["| " + " | ".join(["method", *budgets]) + " |", "|---" * (len(budgets) + 1) + "|"]
    if not budgets:
        rows = ["| method | all entries |", "|---|---|"]
    for method in dict.fromkeys(method for method, _ in texts):
        full = texts.get((method, FULL))
        cells = [full or texts.get((method, budget), "–") for budget in budgets or [FULL]]
        rows.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(rows)


def markdown(results: Results, title: str = "Evaluation") -> str:
    """The page: settings, where learned eviction loses, then a table for every task and length."""
    found = entries(results)
    counts = sorted({e.scores.shape[1] for e in found})
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    lines = [f"# {title}", "", f"Settings: {settings}. Samples per cell: {', '.join(map(str, counts))}."]
    seeds = [len(e.scores) for e in found if e.method.startswith("learned")]
    if not seeds:
        lines += ["After ± stands the standard error over samples.", *_remarks(found, results.settings)]
    else:
        lines += [
            f"Learned methods have up to {max(seeds)} sets of gates; after ± stands the standard error over "
            "samples and sets of gates together.",
            *_remarks(found, results.settings),
            "",
            "## Where learned eviction loses",
            "",
        ]
        lines += [f"- {sentence}" for sentence in losses(found)] or [
            "Nowhere in these tables by more than two standard errors, compared with the full cache and with "
            "every policy but the oracle."
        ]
    for task, length in dict.fromkeys((e.task, e.length) for e in found):
        likelihood = any(e.task == task and e.metric == "nll" for e in found)
        where = f"{length:,} tokens" if length else "texts as they are"
        name = "perplexity" if likelihood else "accuracy"
        lines += ["", f"## {task}, {where}: {name}", "", table(found, task, length)]
        unit = "Nats per token" if likelihood else "Score"
        for other in _yardsticks(found, task, length):
            if paired := paired_table(found, task, length, other):
                lines += ["", f"{unit} above that of {other}, paired over samples:", "", paired]
    return "\n".join(lines) + "\n"


def _yardsticks(found: Sequence[Entry], task: str, length: int) -> list[str]:
    """What every method is compared with: the full cache, and the first learned method."""
    names = [e.method for e in found if (e.task, e.length) == (task, length)]
    full = [e.method for e in found if (e.task, e.length, e.budget) == (task, length, FULL)]
    return [*full[:1], *[name for name in names if name.startswith("learned")][:1]]


def _remarks(found: Sequence[Entry], settings: dict[str, Any]) -> list[str]:
    """What a reader must know not to be misled."""
    lines = []
    chunks = sorted({e.chunk for e in found if e.budget != FULL and e.chunk})
    if chunks:
        told = ", ".join(map(str, chunks))
        lines.append(f"Texts were read in chunks of {told} tokens, alike for all methods at a budget.")
    if sinks := settings.get("sinks"):
        lines.append(
            f"Policies without gates protect at least {sinks} sinks where the budget has room for them, "
            "as the learned ones do."
        )
    for e in found:
        place = f"{e.task}, {e.length} tokens, budget {e.budget}, {e.method}"
        if e.untouched:
            lines.append(
                f"{place}: in {e.untouched} of {e.scores.shape[1]} samples nothing was evicted before the "
                "last thing scored."
            )
        lines += [f"† {place}: not used as its gates were validated ({note})." for note in e.notes]
    return [text for line in lines for text in ("", line)]


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
            "chunk": e.chunk,
            "untouched": e.untouched,
            "notes": list(e.notes),
        }
        for e in entries(results)
    ]
    found = entries(results)
    pairs = [gain for other in dict.fromkeys(_all_yardsticks(found)) for gain in gains(found, other)]
    paired = [{**vars(gain), "error": _number(gain.error)} for gain in pairs]
    return {"settings": results.settings, "rows": rows, "paired": paired}


def _all_yardsticks(found: Sequence[Entry]) -> list[str]:
    places = dict.fromkeys((e.task, e.length) for e in found)
    return [name for place in places for name in _yardsticks(found, *place)]


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
