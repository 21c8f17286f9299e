"""``mlx-kvret train``: retention gates for a base model."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from ..training.config import PAPER, TrainConfig

SELF_RECORDS = 200
EXAMPLES = """
\b
Examples:
  mlx-kvret train Qwen/Qwen3-4B --data chats.jsonl --loss assistant --output qwen3-4b-gates
  mlx-kvret train ./model --dataset org/long-texts --length 32768 --budget 256 --output run
  mlx-kvret train ./model --data book.txt --data more.jsonl --kind rg --scope head --output run
  mlx-kvret train ./qwen3-4b-4bit --data chats.jsonl --length 8192 --output run  # on a Mac
  mlx-kvret train ./model --data chats.jsonl --output run --resume
  mlx-kvret train ./model --data self --output run                       # the model writes the texts
  mlx-kvret train ./model --data self --data book.txt --output run       # and goes on with yours
  mlx-kvret train --output run --export gates-so-far                     # from a run that is not over
  accelerate launch --num_processes 4 "$(which mlx-kvret)" train ./model --data chats.jsonl --output run
  torchrun --nproc-per-node 4 -m mlx_kvret train ./large --shard --data chats.jsonl --output run

The output folder holds log.csv, plots.png, the run's last checkpoint and, at the end, the gates in its
folder "gates", ready for `mlx-kvret generate --gates run/gates`.
"""


def _setting(name: str, text: str, metavar: str | None = None) -> Any:
    """An option for a field of TrainConfig; None if it was not given, so that a preset may speak."""
    default = getattr(TrainConfig, name)
    paper = f"; paper: {PAPER[name]:g}" if name in PAPER else ""
    return click.option(
        f"--{name.replace('_', '-')}",
        type=type(default),
        metavar=metavar,
        help=f"{text}  [default: {default}{paper}]",
    )


@click.command("train", epilog=EXAMPLES)
@click.argument("model", required=False)
@click.option(
    "--data",
    "files",
    multiple=True,
    metavar="FILE",
    help="A .txt file (one document) or .jsonl file (per line an object with text or messages); or self: "
    "the model writes the texts, going on with those of other files if there are any. Repeatable.",
)
@click.option(
    "--self-records",
    type=click.IntRange(1),
    help="Texts to write for --data self (one a sequence, at most 200).",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="NAME",
    help="A data set of the hub or a folder, opened by the datasets package. Repeatable.",
)
@click.option("--split", default="train", show_default=True, help="Which split of the data sets.")
@click.option("--output", "folder", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder.")
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    help="Only write the gates of the run's last checkpoint there.",
)
@click.option(
    "--preset",
    type=click.Choice(["quick", "paper"]),
    default="quick",
    show_default=True,
    help="Defaults that learn in minutes and hours, or the published ones, for days on long texts.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out bad records instead of stopping; they are counted.")
@_setting("kind", "Gates with three maps (rg10) or two (rg).", "[rg10|rg]")
@_setting("width", "Inner width of the gates.")
@_setting("bias", "First bias of the gates; high means keep all.")
@click.option(
    "--shared/--separate",
    "shared_projection",
    default=None,
    help="One last projection for all layers, or one each.  [default: shared for rg10]",
)
@_setting("budget", "M, tokens per KV head of the capacity loss.")
@_setting("scope", "Hold the budget over all heads (global) or in every head (head).", "[global|head]")
@_setting("capacity_weight", "λ, weight of the capacity loss.")
@_setting("tighten", "Share of the run in which the cache comes down to the budget.")
@_setting("sinks", "First positions that never fade; the gates then ask for them in use.")
@_setting("length", "Tokens of a sequence.")
@_setting("batch", "Sequences per step, over all processes.")
@click.option("--micro-batch", default=1, show_default=True, help="Sequences in the model at once.")
@_setting("loss", "Learn from all tokens or from the assistant's only.", "[all|assistant]")
@_setting("learning_rate", "Highest learning rate.")
@_setting("warmup", "Steps, or below 1 share of the run, with a rising rate.")
@click.option("--epochs", type=int, help="Passes over the data.  [default: 1]")
@click.option("--steps", type=int, help="Number of steps, instead of epochs.")
@_setting("clip", "Largest norm of the gradient.")
@_setting("weight_decay", "Of AdamW.")
@_setting("dtype", "Of the base model; gates are float32.", "[auto|float32|bfloat16|float16]")
@_setting("seed", "Of first weights and data order.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "mlx", "cuda", "torch"]),
    default="auto",
    show_default=True,
    help="auto: MLX on Apple Silicon and for models quantised for it, else torch where it is installed.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, gpu (MLX), cuda or cuda:N.")
@click.option("--save-every", default=100, show_default=True, help="Steps between checkpoints.")
@click.option(
    "--recompute/--no-recompute",
    default=True,
    show_default=True,
    help="Recompute layers in the backward pass: slower, far less memory.",
)
@click.option(
    "--shard",
    is_flag=True,
    help="Each of several processes holds a share of the model, for one that does not fit on a device. On "
    "torch; accelerate's FSDP switches it on too.",
)
def command(
    model: str | None,
    files: tuple[str, ...],
    self_records: int | None,
    export: Path | None,
    preset: str,
    datasets: tuple[str, ...],
    split: str,
    folder: Path,
    resume: bool,
    skip_bad: bool,
    backend: str,
    device: str,
    micro_batch: int,
    save_every: int,
    recompute: bool,
    shard: bool,
    **settings: Any,
) -> None:
    """Train retention gates for MODEL: folder or hub id of a transformers or mlx-lm model, or demo, smollm2.

    The model stays as it is. Gates learn to fade what it will not need: it must agree with its full self
    within a budget.
    """
    from ..errors import ConfigError, MissingDependencyError
    from ..training.plots import plot_run
    from ..training.records import Records
    from ..training.run import RunOptions

    if export is not None:
        from ..training.run import export as write

        click.echo(f"gates after step {write(folder, export)}: {export}")
        return
    if model is None:
        raise ConfigError("there is no MODEL; give a folder or hub id of the model to train gates for")
    given = {name: value for name, value in settings.items() if value is not None}
    settings = (PAPER if preset == "paper" else {}) | given
    if settings.get("kind") == "rg":
        settings.setdefault("shared_projection", False)
    config = TrainConfig(**settings)
    chosen = _choose_backend(backend, model)
    if "self" in files:
        self_records = self_records or min(SELF_RECORDS, (config.steps or SELF_RECORDS) * config.batch)
        files = _own_words(model, chosen, files, folder, self_records, config, resume)
    records = Records(files, datasets, split, skip_bad)
    if backend == "torch" and device == "auto":
        device = "cpu"
    backend = "mlx_backend" if chosen == "mlx" else "cuda_backend"
    train = importlib.import_module(f"mlx_kvret.{backend}.training.engine").train
    gates = train(
        model, records, config, RunOptions(folder, resume, device, micro_batch, save_every, recompute, shard)
    )
    if gates is None:
        return
    if records.skipped:
        click.echo(f"skipped {len(records.skipped)} bad records, first: {records.skipped[0]}", err=True)
    try:
        click.echo(f"plots: {plot_run(folder)}")
    except MissingDependencyError as error:
        click.echo(f"no plots: {error}", err=True)
    click.echo(f"gates: {gates}")


def _choose_backend(backend: str, model: str) -> str:
    """As :func:`mlx_kvret.api.choose_backend`, but a CPU goes to torch first, which has processes."""
    from ..api import backends, choose_backend
    from ..errors import ConfigError
    from ..training.run import Base

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and backend == "mlx":
        raise ConfigError(
            "MLX trains in one process; start mlx-kvret without accelerate, or use --backend torch"
        )
    if backend != "auto":
        return choose_backend(backend)
    torch_there = backends()["torch"] == "ok"
    if "quantization" in Base.find(model).config:
        return choose_backend("mlx")
    if torch_there and (several or sys.platform != "darwin"):
        return "torch"
    return choose_backend("auto")


def _own_words(
    model: str,
    backend: str,
    files: tuple[str, ...],
    folder: Path,
    count: int,
    config: TrainConfig,
    resume: bool,
) -> tuple[str, ...]:
    """The file of texts the model wrote, beside the run's folder; written first if it is not there."""
    from ..evaluation.progress import Progress
    from ..training.own_words import own_words
    from ..training.records import Records

    path = folder.with_name(f"{folder.name}-own-words.jsonl")
    if not (resume and path.exists()):
        others = tuple(name for name in files if name != "self")
        texts = Records(others, (), "train", False) if others else None
        seeds = [texts.read(index) for index in range(len(texts))] if texts else []
        written = own_words(model, backend, seeds, path, count, config.length, config.seed, resume)
        with Progress(count, next(written), unit="text") as told:
            told.starts(f"writing {path.name}")
            for _ in written:
                told.done()
    return (str(path),)
