"""Accuracy against budget, one panel for each task and length; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..core.files import whole_file
from ..errors import ConfigError, MissingDependencyError
from .methods import parse_fraction
from .report import Entry
from .runner import FULL

SUFFIXES = (".png", ".svg")
_COLUMNS = 4


def check_plot(path: str | Path) -> Path:
    """The file a plot goes to.

    Raises:
        ConfigError: neither ``.png`` nor ``.svg``.
        MissingDependencyError: matplotlib is not installed.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot {path} ends with {path.suffix!r}; expected {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib; run `pip install 'mlx-kvret[plot]'`") from error
    return path


def plot(found: Sequence[Entry], path: str | Path) -> None:
    """Draw every task and length of a report into a PNG or SVG file."""
    path = check_plot(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((e.task, e.length) for e in found))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    methods = list(dict.fromkeys(e.method for e in found if e.budget != FULL))
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.3 * len(methods) / columns), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axis, (task, length) in zip(axes, panels, strict=False):
        here = [e for e in found if (e.task, e.length) == (task, length)]
        nll = here[0].metric == "nll"
        for index, method in enumerate(methods):
            points = sorted((_x(e.budget), *_y(e)) for e in here if e.method == method)
            if points:
                x, y, error = zip(*points, strict=True)
                shown = [0.0 if math.isnan(e) else e for e in error]
                colour = colours[2 * index % 20 + 2 * index // 20]
                axis.errorbar(x, y, shown, label=method, color=colour, marker=".", capsize=2, lw=1.2)
        for e in here:
            if e.budget == FULL:
                axis.axhline(
                    math.exp(e.mean) if nll else e.mean, color="black", ls="--", lw=1, label=e.method
                )
        axis.set_title(f"{task}, {length:,} tokens" if length else task, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("budget" + (" (share of the text)" if all(_x(e.budget) <= 1 for e in here) else ""))
        axis.set_ylabel("perplexity" if nll else "accuracy")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    named = {
        label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(3, columns), fontsize=8)
    # no date and fixed ids, so that the same results give the same file
    with whole_file(path) as scratch, matplotlib.rc_context({"svg.hashsalt": "mlx-kvret"}):
        figure.savefig(scratch, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _x(budget: str) -> float:
    if budget == FULL:
        return 1.0
    top, bottom = parse_fraction(budget)
    return top / bottom if bottom else float(top)


def _y(entry: Entry) -> tuple[float, float]:
    """What is drawn, and its error."""
    if entry.metric == "nll":
        return math.exp(entry.mean), entry.error * math.exp(entry.mean)
    return entry.mean, entry.error
