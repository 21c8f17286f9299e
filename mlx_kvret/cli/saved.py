"""What a saved cache is: ``mlx-kvret info FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..core.bits import said_bits
from ..core.parts import Part, kept_by_part
from ..core.plan import size
from ..core.snapshot import Snapshot, read_snapshot
from ..reading import RAW
from .ending import one_line
from .screen import columns, fitted

_BAR = 24


def show_saved(path: Path) -> None:
    """Print what a file holds.

    Raises:
        CheckpointError: it is no saved cache, or damaged.
    """
    snapshot = read_snapshot(path)
    rows = facts(path, snapshot)
    indent = max(map(len, rows)) + 4
    for name, value in rows.items():
        line = f"  {name:<{indent - 2}}{one_line(value)}"
        click.echo(fitted(line, columns(sys.stdout), " " * indent))
    parts = kept_by_part(snapshot.position, snapshot.counts.size, snapshot.seen)
    if parts:
        click.echo("\n  kept of each part of the text")
        click.echo("\n".join(bars(parts)))


def facts(path: Path, snapshot: Snapshot) -> dict[str, str]:
    """What a saved cache is, by name."""
    layers, heads = snapshot.counts.shape
    entries, full = len(snapshot.position), snapshot.seen * snapshot.counts.size
    packed = snapshot.packed
    stored = [snapshot.keys, snapshot.values] + ([] if packed is None else [packed.keys, packed.values])
    held = sum(tensor.bits.nbytes for tensor in stored)
    entry = (snapshot.keys.shape[1] + snapshot.values.shape[1]) * snapshot.keys.bits.itemsize
    kind = snapshot.keys.dtype
    if packed is not None:
        kind = f"{kind}, kept ones in {said_bits(snapshot.eviction.kv_bits)} bits"
    chosen = snapshot.eviction.to_dict()
    budget, buffer = chosen.pop("budget"), chosen.pop("buffer")
    others = ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)
    whole = f"; a full cache would take {size(entry * full)}" if entries else ""
    rows = {
        "saved cache": f"{path} ({size(path.stat().st_size)})",
        "model": snapshot.model,
        "gates": snapshot.gates or "none",
        "tokens read": f"{snapshot.seen:,}",
        "budget": f"{budget:,} tokens per KV head and a buffer of {buffer:,}",
        "eviction": others,
        "entries": f"{entries:,} of {full:,}, in {layers} layers of {heads} KV heads",
        "memory": f"{size(held)} of K and V in {kind}{whole}",
    }
    if snapshot.extras:
        rows["beside them"] = f"{len(snapshot.extras)} layers with a cache of their own"
    return rows | {"read as": how(snapshot.notes)}


def how(notes: dict[str, str]) -> str:
    """What the notes beside a cache say of what it has read."""
    if notes == RAW:
        return "text as it is, without a chat template"
    if not notes:
        return "tokens; there are no notes, so no chat can go on with it"
    try:
        messages: Any = json.loads(notes["messages"])
        begun: Any = json.loads(notes["tokens"])["begun"]
        said = [] if not messages else [f"a conversation of {len(messages)} messages"]
        if begun is not None:
            said.append("a text that waits for a question" if begun.get("open") else "a message broken off")
        return " and ".join(said) or "a conversation that has not begun"
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return f"something else, with notes of their own: {', '.join(sorted(notes))}"


def bars(parts: list[Part]) -> list[str]:
    """A line for each part, the longest bar for the part of which most is kept."""
    most = max(part.share for part in parts) or 1.0
    wide = len(f"{parts[-1].end:,}")
    return [
        f"  {part.start + 1:>{wide},} - {part.end:>{wide},}  "
        f"{'#' * round(_BAR * part.share / most):<{_BAR}}{part.share:>7.1%}"
        for part in parts
    ]
