"""``mlx-kvret convert``: gate folders from one form to another."""

from __future__ import annotations

from pathlib import Path

import click

from ..texts import read_text
from .ending import leaving_at_once
from .screen import note

EPILOG = """\b
Examples:
  mlx-kvret convert ngocbh/DBTrimKV-Qwen3-4B-Math gates --to shared
  mlx-kvret convert gates gates-bf16 --to shared --dtype bfloat16
  mlx-kvret convert gates gates-8bit --to mlx --bits 8 --model ./Qwen3-4B
  mlx-kvret convert gates released --to trimkv --model Qwen/Qwen3-4B
"""


@click.command("convert", epilog=EPILOG)
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["shared", "mlx", "torch", "trimkv"]),
    help="Form to write.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Float type of all tensors; without it each keeps its own.",
)
@click.option("--bits", type=int, metavar="8", help="Store the large maps in 8 bits (mlx only).")
@click.option(
    "--model",
    metavar="FOLDER",
    help="The base model (folder or hub id): checks the gates, measures what a rounding changes, and gives "
    "its config to a trimkv folder.",
)
@click.option(
    "--prompt-file",
    metavar="FILE",
    help="Text to measure on in the base model, '-' for stdin; without it a built-in one.",
)
def command(
    src: str,
    dst: Path,
    to: str,
    dtype: str | None,
    bits: int | None,
    model: str | None,
    prompt_file: str | None,
) -> None:
    """Convert the gates in SRC, a folder or a hub id in any form, and write the new folder DST.

    \b
    shared  safetensors + json, for every backend
    mlx     the same for MLX alone: in one float type, or in 8 bits
    torch   as shared, with the weights of all layers stacked
    trimkv  as TRIM-KV and DBTrimKV release their gates (writing them needs torch)

    DST appears whole or not at all. If values change, the share of cache entries on whose eviction old and
    new gates agree is printed.
    """
    with leaving_at_once():
        from mlx_kvret.converters import convert
        from mlx_kvret.hub import resolve

    done = convert(
        resolve(src, "gates"),
        dst,
        to,
        dtype=dtype,
        bits=bits,
        model=resolve(model) if model else None,
        prompt=None if prompt_file is None else read_text(prompt_file),
    )
    note(str(done))
