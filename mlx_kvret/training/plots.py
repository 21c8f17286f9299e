"""One page about a run: losses, soft cache size by layer and head, and what is retained by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.checkpoint import read_json
from ..core.files import whole_file
from ..errors import MissingDependencyError
from .log import read_log

NAME = "plots.png"


def plot_run(folder: Path) -> Path:
    """Draw ``log.csv`` and ``profile.json`` of a run's folder into ``plots.png`` there.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib; run `pip install 'mlx-kvret[plot]'`, then the same command with --resume"
        ) from error
    log = read_log(folder / "log.csv")
    profile = read_json(folder / "profile.json")
    figure = Figure(figsize=(12, 8), layout="constrained")
    losses, cache, heads, kept = figure.subplots(2, 2).flat
    steps = [row["step"] for row in log]
    for name, label in (("kl", "KL"), ("cross_entropy", "cross-entropy"), ("capacity", "capacity")):
        losses.plot(steps, [row[name] for row in log], label=label)
    losses.set(title="Losses", xlabel="step", ylabel="nats per token; capacity: share")
    losses.set_yscale("symlog", linthresh=1e-3)
    losses.set_ylim(bottom=0)
    losses.legend()
    cache.plot(steps, [row["soft_size"] for row in log], color="C4")
    cache.set(title="Soft cache size", xlabel="step", ylabel="tokens per head", ylim=(0, None))
    _draw_heads(figure, heads, profile["soft_size"])
    kept.step([*profile["position"]], profile["retained"], where="post")
    kept.set(
        title="Retained at the end of a document", xlabel="position", ylabel="mean over heads", ylim=(0, None)
    )
    with whole_file(folder / NAME) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    return folder / NAME


def _draw_heads(figure: Any, axes: Any, sizes: list[list[float]]) -> None:
    image = axes.imshow(sizes, aspect="auto", origin="lower", cmap="viridis", vmin=0)
    axes.set(title="Soft cache size by layer and head", xlabel="KV head", ylabel="layer with gates")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="tokens, averaged over a batch")
