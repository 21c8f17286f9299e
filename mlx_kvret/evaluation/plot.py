"""Score against budget, one panel for each task and length; needs matplotlib (extra ``plot``).

Likelihoods are drawn as nats above the full cache, paired over samples, where it was measured too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core.files import whole_file
from ..errors import ConfigError, MissingDependencyError
from .methods import parse_fraction
from .report import Entry, gains
from .runner import FULL

SUFFIXES = (".png", ".svg")
_COLUMNS = 4
# Every policy has one place, colour and marker in all pictures. The colours are those of Okabe and Ito, which
# colour-blind people tell apart; markers tell them where there is no colour.
_STYLES = {
    "learned-global": ("#0072B2", "o"),
    "learned-layer": ("#56B4E9", "s"),
    "learned-head": ("#009E73", "^"),
    "h2o": ("#D55E00", "D"),
    "snapkv": ("#E69F00", "v"),
    "keydiff": ("#CC79A7", "P"),
    "knorm": ("#7F4F24", "X"),
    "recent": ("#000000", "<"),
    "random": ("#8C8C8C", "."),
    "oracle": ("#B8A800", "*"),
}
# of variants of one policy in one picture, in turn
_DASHES = ("-", "--", ":", "-.")


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


def plot(found: Sequence[Entry], path: str | Path, names: dict[str, str] | None = None) -> None:
    """Draw every task and length of a report into a PNG or SVG file; ``names`` are others for methods."""
    path = check_plot(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((e.task, e.length) for e in found))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    styles = _styles(e.method for e in found if e.budget != FULL)
    width = max(6.0, 4.2 * columns)
    figure = Figure(figsize=(width, 3.4 * rows + 0.9 * len(styles) / max(2, columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (task, length) in zip(axes, panels, strict=False):
        _panel(axis, [e for e in found if (e.task, e.length) == (task, length)], styles, names or {})
        axis.set_title(f"{task}, {length:,} tokens" if length else task, fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    named = {
        label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    order = [label for label in ((names or {}).get(m, m) for m in styles) if label in named]
    order += [label for label in named if label not in order]
    figure.legend(
        [named[label] for label in order],
        order,
        loc="outside lower center",
        ncols=min(3, max(2, columns)),
        fontsize=8,
    )
    # no date and fixed ids, so that the same results give the same file
    with whole_file(path) as scratch, matplotlib.rc_context({"svg.hashsalt": "mlx-kvret"}):
        figure.savefig(scratch, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, in the order of policies."""
    order = list(_STYLES)
    by_policy: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        by_policy.setdefault(_policy(method), []).append(method)
    found = {}
    for policy in sorted(by_policy, key=lambda name: order.index(name) if name in order else len(order)):
        colour, marker = _STYLES.get(policy, ("#444444", "x"))
        for method, dash in zip(by_policy[policy], itertools.cycle(_DASHES), strict=False):
            found[method] = {"color": colour, "marker": marker, "ls": dash, "ms": 4, "capsize": 2, "lw": 1.2}
    return found


def _policy(method: str) -> str:
    """``learned:threshold=1e-6 (demo)`` is of ``learned-global``."""
    name = method.partition(" ")[0].partition(":")[0]
    return "learned-global" if name == "learned" else name


def _panel(axis: Any, here: list[Entry], styles: dict[str, dict[str, Any]], names: dict[str, str]) -> None:
    """One task at one length."""
    nll = here[0].metric == "nll"
    above = {(g.method, g.budget): g for g in gains(here, "full")} if nll else {}
    ticks = {_x(e.budget): e.budget for e in here if e.budget != FULL}
    for method, style in styles.items():
        points = []
        for e in (e for e in here if e.method == method and e.budget != FULL):
            gain = above.get((method, e.budget))
            points.append((_x(e.budget), *(_y(e) if gain is None else (-gain.mean, gain.error))))
        if points:
            x, y, error = zip(*sorted(points), strict=True)
            shown = [0.0 if math.isnan(e) else e for e in error]
            axis.errorbar(x, y, shown, label=names.get(method, method), **style)
    for e in here:
        if e.budget == FULL:
            level = 0.0 if above and e.method == "full" else _y(e)[0]
            axis.axhline(level, color="black", ls=(0, (5, 3)), lw=1, label=names.get(e.method, e.method))
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(ticks), [ticks[x] for x in sorted(ticks)])
    axis.minorticks_off()
    axis.set_xlabel(
        "budget, share of the text" if ticks and max(ticks) <= 1 else "budget, tokens per KV head"
    )
    if above:
        axis.set_ylabel("nats per token above the full cache")
    else:
        axis.set_ylabel("perplexity" if nll else "accuracy")
    axis.grid(alpha=0.3)


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
