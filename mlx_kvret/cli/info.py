"""``mlx-kvret info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.bits import CHOICES, said_bits
from ..errors import CheckpointError, ConfigError
from .ending import leaving_at_once, one_line

LENGTHS = (4096, 32768, 131072)


@click.command("info")
@click.argument("name")
@click.option(
    "--budget", multiple=True, help="Budget to price, repeatable: 1024, 256MB.  [default: 256, 1024, 4096]"
)
@click.option("--context", type=int, multiple=True, help="Context length to compare with, repeatable.")
@click.option(
    "--kv-bits",
    type=click.Choice(CHOICES),
    help="Bits of kept keys and values.  [default: 16, which is the model's own float type]",
)
@leaving_at_once()
def command(name: str, budget: tuple[str, ...], context: tuple[int, ...], kv_bits: str | None) -> None:
    """What a model, a gate folder or a saved cache is, and what a budget costs.

    NAME is a folder, a hub id, a name (demo, smollm2), or a file that `read` or /save in a chat wrote. The
    gates that are known for a model are shown.

    \b
    Examples:
      mlx-kvret info demo
      mlx-kvret info ./my-gates
      mlx-kvret info notes.kv
      mlx-kvret info mlx-community/Qwen3-4B-4bit --budget 1024 --budget 256MB --context 32768
    """
    from ..core.budget import parse_budget
    from ..core.config import MOST_TOKENS
    from ..core.options import whole
    from ..hub import resolve

    for length in context:
        whole("--context", length, 1, MOST_TOKENS)
    for text in budget:
        parse_budget(text)
    path = Path(name).expanduser()
    if path.is_file():
        if budget or context or kv_bits:
            raise ConfigError(
                f"{path} is a saved cache, for which --budget, --context and --kv-bits say nothing; drop them"
            )
        from .saved import show_saved

        show_saved(path)
        return
    folder = resolve(name)
    shown = False
    if any((folder / file).exists() for file in ("kvret.json", "trimkv_weights.pth")):
        show_gates(folder)
        shown = True
    elif (folder / "config.json").exists():
        config = show_model(folder, budget or ("256", "1024", "4096"), context or LENGTHS, kv_bits)
        shown = True
        show_known_gates(folder, config, name)
        click.echo(f"\nwhat fits into a memory: mlx-kvret plan {one_line(name)} --memory 16GB")
    if not shown:
        raise CheckpointError(
            f"{folder} is neither a model (config.json) nor gates (kvret.json); check the path"
        )
    show_backends()


def show_gates(folder: Path) -> None:
    from mlx_kvret.converters import detect, load_any

    form, checkpoint = detect(folder), load_any(folder)
    config = checkpoint.config
    wishes = (config.eviction.to_dict() if config.eviction else {}).items()
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
        "used with": ", ".join(f"{key} = {value}" for key, value in wishes) or "no options of their own",
    }
    rows |= {
        key: value for key, value in checkpoint.provenance.items() if not isinstance(value, (dict, list))
    }
    _table(rows)


def show_known_gates(folder: Path, config: dict[str, Any], name: str) -> None:
    """What ``--gates auto`` would do with a model, and other gates that are known for its shape."""
    from ..zoo import auto, identity

    found = auto.matches(identity.of_folder(folder, config, name))
    click.echo("\ngates that are known for it")
    if not found:
        click.echo(f"  none; train some, or choose a policy that needs none: {auto.FREE}")
    for place, match in enumerate(found):
        taken = place == 0 and match.sure
        how = "taken by itself" if taken else f"--gates {match.entry.gates}"
        click.echo(f"  {one_line(how)}: {one_line(match)}")
    if found and found[0].sure and found[0].entry.folder:
        click.echo()
        show_gates(found[0].entry.folder)


def show_model(
    folder: Path, budgets: tuple[str, ...], lengths: tuple[int, ...], kv_bits: str | None = None
) -> dict[str, Any]:
    """What a model is and what budgets cost; returns its config."""
    from ..api import any_backend
    from ..core.request import eviction

    config, shape = any_backend().cache_shape(folder)
    chosen = [(budget, eviction(shape, budget, kv_bits=kv_bits)) for budget in budgets]
    bits = chosen[0][1].kv_bits
    _table({
        "model": f"{folder} ({config.get('model_type', 'type unknown')})",
        "cache": f"{shape.layers} layers that can be bounded, {shape.kv_heads} KV heads, "
        f"K {shape.key_dim} + V {shape.value_dim}, {shape.itemsize} bytes each"
        f"{'' if bits is None else f', {shape.kept_bytes(bits)} bytes an entry in {said_bits(bits)} bits'}",
        "one token": f"{shape.full_nbytes(1) / 1e3:.1f} KB",
    })  # fmt: skip
    click.echo("\nKV memory, most after prefill, and as a share of the full cache:")
    click.echo("  budget      per head      bounded" + "".join(f"{n:>14,}" for n in lengths))
    for budget, plan in chosen:
        size = shape.nbytes(plan.budget, plan.buffer, bits)
        shares = "".join(f"{size / shape.full_nbytes(n):>14.1%}" for n in lengths)
        click.echo(f"  {budget:<10}{plan.budget:>10,}{size / 1e6:>10.1f} MB{shares}")
    click.echo("  full" + " " * 29 + "".join(f"{shape.full_nbytes(n) / 1e6:>11,.1f} MB" for n in lengths))
    return config


def show_backends() -> None:
    from ..api import backends

    found = backends()
    click.echo("\nbackends")
    _table(found)
    if found["mlx"] == "ok":
        from ..mlx_backend.kernels import status

        click.echo(f"\nkernels of the MLX backend: {status()}")


def _table(rows: dict[str, Any]) -> None:
    width = max(map(len, rows)) + 2
    for key, value in rows.items():
        # what files say is one line each, and no command to the terminal
        click.echo(f"  {one_line(key):<{width}}{one_line(value)}")
