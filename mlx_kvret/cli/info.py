"""``mlx-kvret info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import CheckpointError

LENGTHS = (4096, 32768, 131072)


@click.command("info")
@click.argument("name")
@click.option(
    "--budget", multiple=True, help="Budget to price, repeatable: 1024, 256MB.  [default: 256, 1024, 4096]"
)
@click.option("--context", type=int, multiple=True, help="Context length to compare with, repeatable.")
def command(name: str, budget: tuple[str, ...], context: tuple[int, ...]) -> None:
    """What a model or a gate folder is, and what a budget costs.

    NAME is a folder, a hub id, or 'demo'.

    \b
    Examples:
      mlx-kvret info demo
      mlx-kvret info ./my-gates
      mlx-kvret info mlx-community/Qwen3-4B-4bit --budget 1024 --budget 256MB --context 32768
    """
    from .. import demo
    from ..core.budget import parse_budget
    from ..core.config import MOST_TOKENS
    from ..core.options import whole
    from ..hub import resolve

    for length in context:
        whole("--context", length, 1, MOST_TOKENS)
    for text in budget:
        parse_budget(text)
    folder = demo.MODEL if name == "demo" else resolve(name)
    shown = False
    if any((folder / file).exists() for file in ("kvret.json", "trimkv_weights.pth")):
        show_gates(folder)
        shown = True
    elif (folder / "config.json").exists():
        show_model(folder, budget or ("256", "1024", "4096"), context or LENGTHS)
        shown = True
        if name == "demo":
            show_gates(demo.GATES)
    if not shown:
        raise CheckpointError(
            f"{folder} is neither a model (config.json) nor gates (kvret.json); check the path"
        )
    show_backends()


def show_gates(folder: Path) -> None:
    from converters import detect, load_any
    from converters.mlx_form import load_mlx

    form = detect(folder)
    checkpoint = load_mlx(folder) if form == "mlx" else load_any(folder)
    config = checkpoint.config
    size = sum(t.bits.nbytes for t in checkpoint.tensors.values())
    rows: dict[str, Any] = {
        "gates": f"{folder} ({form} form, {size / 1e6:.2f} MB)",
        "kind": f"{config.kind}, {'shared' if config.shared_projection else 'separate'} last projection",
        "shape": f"{config.layers} layers, {config.kv_heads} KV heads, hidden {config.hidden_size}, "
        f"width {config.width}",
        "base model": config.base_model or "not named",
        "fingerprint": config.base_fingerprint or "none",
        "trained for": f"M = {config.training_budget} tokens per head"
        if config.training_budget
        else "unknown",
    }
    rows |= {
        key: value for key, value in checkpoint.provenance.items() if not isinstance(value, (dict, list))
    }
    _table(rows)


def show_model(folder: Path, budgets: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    from ..core.request import eviction
    from ..wing import cache_shape

    config, shape = cache_shape(folder)
    chosen = [(budget, eviction(shape, budget)) for budget in budgets]
    _table({
        "model": f"{folder} ({config.get('model_type', 'type unknown')})",
        "cache": f"{shape.layers} layers that can be bounded, {shape.kv_heads} KV heads, "
        f"K {shape.key_dim} + V {shape.value_dim}, {shape.itemsize} bytes each",
        "one token": f"{shape.full_nbytes(1) / 1e3:.1f} KB",
    })  # fmt: skip
    click.echo("\nKV memory, most after prefill, and as a share of the full cache:")
    click.echo("  budget      per head      bounded" + "".join(f"{n:>14,}" for n in lengths))
    for budget, plan in chosen:
        size = shape.nbytes(plan.budget, plan.buffer)
        shares = "".join(f"{size / shape.full_nbytes(n):>14.1%}" for n in lengths)
        click.echo(f"  {budget:<10}{plan.budget:>10,}{size / 1e6:>10.1f} MB{shares}")
    click.echo("  full" + " " * 29 + "".join(f"{shape.full_nbytes(n) / 1e6:>11,.1f} MB" for n in lengths))


def show_backends() -> None:
    from ..api import backends

    found = backends()
    click.echo("\nbackends")
    _table(found)
    if found["mlx"] == "ok":
        from ..kernels import status

        click.echo(f"\nkernels of the MLX wing: {status()}")


def _table(rows: dict[str, Any]) -> None:
    width = max(map(len, rows)) + 2
    for key, value in rows.items():
        click.echo(f"  {key:<{width}}{value}")
