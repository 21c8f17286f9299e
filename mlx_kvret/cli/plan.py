"""``mlx-kvret plan``: which budget, and how many conversations, fit into a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.bits import CHOICES, parse_bits, said_bits
from ..core.plan import Plan, Row, parse_memory, parse_tokens, plan, size
from ..errors import CheckpointError
from .ending import leaving_at_once, one_line
from .screen import note


@click.command("plan")
@click.argument("model")
@click.option("--memory", required=True, help="For weights and caches: 16GB, 11.5GiB.")
@click.option("--context", help="Tokens of a conversation: 32768, 128k.  [default: the model's longest]")
@click.option("--conversations", type=int, default=1, show_default=True, help="How many side by side.")
@click.option(
    "--machines",
    type=int,
    default=1,
    show_default=True,
    help="How many hold the model together, each with --memory.",
)
@click.option("--gates", default="auto", show_default=True, help="Folder or hub id of the retention gates.")
@click.option(
    "--kv-bits",
    type=click.Choice(CHOICES),
    default="16",
    help="Bits of kept keys and values.  [default: 16, which is the model's own float type]",
)
@leaving_at_once()
def command(
    model: str, memory: str, context: str | None, conversations: int, machines: int, gates: str, kv_bits: str
) -> None:
    """Which budget, and how many conversations, fit into a memory.

    MODEL is a folder, a hub id, or a name: demo, smollm2. No weights are read: the sizes of their files and
    the shape of the cache are enough. What the runtime itself takes (hundreds of MB) is not counted, and of a
    Mac's memory the GPU may have about two thirds to three quarters.

    \b
    Examples:
      mlx-kvret plan smollm2 --memory 2GB --context 8k
      mlx-kvret plan mlx-community/Qwen3-4B-4bit --memory 11GB --context 128k --conversations 4
      mlx-kvret plan mlx-community/Qwen3-235B-A22B-4bit --memory 96GB --context 128k --machines 2
    """
    from ..api import any_backend
    from ..core.options import whole
    from ..hub import resolve

    given, bits = parse_memory(memory), parse_bits(kv_bits)
    asked = None if context is None else parse_tokens(context)
    whole("--conversations", conversations, 1)
    whole("--machines", machines, 1)
    folder = resolve(model)
    config, shape = any_backend().cache_shape(folder)
    tokens, weights = asked or longest(config), weight_bytes(folder)
    smallest, label = sound_from(folder, config, model, gates)
    found = plan(
        shape, given, weights, tokens, conversations, smallest=smallest, kv_bits=bits, machines=machines
    )
    note(
        f"{one_line(model)}: {size(weights)} of weights"
        f"{'' if machines == 1 else f' over {machines} machines; on each'}, "
        f"{size(found.room)} of {size(given)} left for "
        f"conversations of {tokens:,} tokens; K and V take {shape.itemsize * 8} bits per number"
        f"{'' if bits is None else f', once kept {said_bits(bits)}'}."
    )
    click.echo(f"\n  {'tokens kept':<16}{'per conversation':>17}{'fit':>8}")
    for row in (found.full, *found.bounded):
        click.echo(_line(row))
    click.echo()
    note(verdict(found, smallest, label))


def _line(row: Row) -> str:
    name = "all" if row.budget is None else f"{row.budget:,}"
    unsound = "  below what the gates were tried with" if row.sound is False else ""
    return f"  {name:<16}{size(row.nbytes):>17}{row.conversations:>8,}{unsound}".rstrip()


def verdict(found: Plan, smallest: int | None, label: str) -> str:
    """What to choose, in words."""
    many = "a conversation" if found.conversations == 1 else f"{found.conversations:,} conversations"
    if found.full.conversations >= found.conversations:
        said = f"The full cache fits {many} of {found.context:,} tokens; a budget saves memory and time."
    elif found.largest is None:
        said = f"Not even the smallest budget fits {many}; give more memory, or fewer conversations."
    else:
        said = f"The largest budget that fits {many}: --budget {found.largest.budget}."
        if found.largest.sound is False:
            said += f" The gates were found sound from {smallest:,} on, which does not fit."
    if smallest is not None:
        return f"{said}\nThe gates ({label}) were found sound from a budget of {smallest:,} on."
    return f"{said}\n{label[:1].upper()}{label[1:]}."


def longest(config: dict[str, Any]) -> int:
    """Tokens that a model was made for; 32,768 where its config does not say."""
    from ..core.advice import reach_of

    return reach_of(config) or 32768


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights, by its files.

    Raises:
        CheckpointError: there are none.
    """
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        if found := sum(file.stat().st_size for file in folder.glob(pattern)):
            return found
    raise CheckpointError(f"{folder} holds no weights (*.safetensors); give a whole model folder")


def sound_from(folder: Path, config: dict[str, Any], name: str, gates: str) -> tuple[int | None, str]:
    """The smallest budget at which the gates were found sound, and their name; or None and why not."""
    from ..core.checkpoint import read_manifest
    from ..hub import resolve
    from ..zoo import auto, identity

    if gates == "none":
        return None, "without gates nothing says which budget is sound"
    if gates == auto.AUTO:
        known = [match for match in auto.matches(identity.of_folder(folder, config, name)) if match.sure]
        if not known:
            return None, "no gates are known for this model, so nothing says which budget is sound"
        label, place = known[0].entry.label, known[0].entry.folder
    else:
        label, place = gates, resolve(gates, "gates")
    silent = f"the gates {label} do not say from which budget on they are sound"
    if place is None or not (place / "kvret.json").is_file():
        return None, silent
    found, _, _ = read_manifest(place)
    if found.eviction is not None and found.eviction.smallest_budget is not None:
        return found.eviction.smallest_budget, label
    trained = found.training_budget
    return None, f"{silent}; they were trained for {trained:,} tokens per head" if trained else silent
