"""The page of results on the real model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_kvret.core.files import whole_file
from mlx_kvret.evaluation import Cell, entries, gains
from mlx_kvret.evaluation.plot import plot
from mlx_kvret.evaluation.report import Entry
from mlx_kvret.evaluation.runner import FULL

KINDS = ("dialogue", "novel", "technical")
# names on the page, in order
METHODS = {
    "learned-global (smollm2)": "**learned, global**",
    "learned-layer (smollm2)": "learned, per layer",
    "learned-head (smollm2)": "learned, per head",
    "h2o": "H2O (sees attention)",
    "snapkv": "SnapKV (sees attention)",
    "keydiff": "KeyDiff",
    "knorm": "key norm",
    "recent": "sinks + window",
    "random": "random (4 sinks, window)",
}
OURS = "learned-global (smollm2)"


def write_page(cells: Sequence[Cell], out: Path) -> None:
    """Tables of nats above the full cache, and where the learned policy is beaten."""
    found = entries(cells)
    lengths = sorted({entry.length for entry in found})
    lines = [
        "# Learned eviction on a real model",
        "",
        "SmolLM2-135M-Instruct (30 layers, 3 KV heads), bfloat16, by `python examples/real_model.py`. Nats",
        "per token above the full cache on text that no gates have seen (Moby-Dick, Perl's manuals, four",
        "plays of Shakespeare, as many pieces of each), ± standard error, paired over pieces (and seeds of",
        "gates). Texts are read in chunks of half a budget; the buffer is an eighth of it. Below 0 is better",
        "than the full cache. All policies protect four sinks, the heuristics a recent window as well.",
        "",
        f"![Nats above the full cache against the budget]({out.with_suffix('.png').name})",
    ]
    for length in lengths:
        own = [entry for entry in found if entry.length == length]
        lines += ["", f"## {length:,} tokens", "", *_heading(own), "", *_table(own)]
        lines += ["", *_by_kind(own)]
    lines += ["", "## Where global learned eviction is not the best", "", *_beaten(found)]
    with whole_file(out, parents=True) as scratch:
        scratch.chmod(0o644)
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = {method: name.strip("*") for method, name in METHODS.items()} | {"full": "full cache"}
    plot([e for e in found if e.length == lengths[0]], out.with_suffix(".png"), names)


def _budgets(found: Sequence[Entry]) -> list[str]:
    return sorted({e.budget for e in found if "/" in e.budget}, key=lambda text: int(text.split("/")[1]))


def _heading(found: Sequence[Entry]) -> list[str]:
    full = next(entry for entry in found if entry.method == "full")
    pieces = full.scores.shape[1]
    seeds = max(len(e.scores) for e in found if e.method == OURS) if _has(found, OURS) else 0
    return [
        f"{pieces} pieces, {seeds} {'set' if seeds == 1 else 'sets'} of gates; full cache "
        f"{full.mean:.4f} nats per token."
    ]


def _has(found: Sequence[Entry], method: str) -> bool:
    return any(entry.method == method for entry in found)


def _table(found: Sequence[Entry]) -> list[str]:
    budgets = _budgets(found)
    shown = {(g.method, g.budget): g.shown for g in gains(found, "full")}
    rows = [f"| | {' | '.join(budgets)} |", "|---" * (len(budgets) + 1) + "|"]
    for method, name in METHODS.items():
        if _has(found, method):
            rows.append(f"| {name} | " + " | ".join(shown.get((method, b), "–") for b in budgets) + " |")
    return rows


def _by_kind(found: Sequence[Entry]) -> list[str]:
    """Global learned eviction and the best heuristic, for each kind of text."""
    full = next(entry for entry in found if entry.method == "full").scores.mean(0)
    size = len(full) // len(KINDS)
    rows = ["By kind of text, learned global / H2O:", "", "| | " + " | ".join(_budgets(found)) + " |"]
    rows.append("|---" * (len(_budgets(found)) + 1) + "|")
    by_place = {(e.method, e.budget): e.scores.mean(0) - full for e in found if e.method in (OURS, "h2o")}
    for number, kind in enumerate(KINDS):
        part = slice(number * size, (number + 1) * size)
        cells = []
        for budget in _budgets(found):
            pair = [by_place.get((method, budget)) for method in (OURS, "h2o")]
            cells.append(" / ".join("–" if x is None else f"{float(np.mean(x[part])):+.4f}" for x in pair))
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return rows


def _beaten(found: Sequence[Entry]) -> list[str]:
    """Every policy, the full cache included, that is ahead at some place; by how many standard errors."""
    lines = []
    for entry in found:
        if entry.method != OURS:
            continue
        for other in found:
            same = other.length == entry.length and other.budget in (entry.budget, FULL)
            if other is entry or not same or other.method == OURS:
                continue
            gain, error = entry.ahead(other)
            if gain < 0 and not math.isnan(error):
                name = METHODS.get(other.method, "the full cache").strip("*")
                place = f"{entry.length:,} tokens, {entry.budget}"
                lines.append(f"- {place}: {name} is {-gain:.4f} ± {error:.4f} nats ahead")
    return lines or ["Nowhere."]
