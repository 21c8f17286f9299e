"""The command line: ``mlx-kvret COMMAND``. A command's module is imported when it is run."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from ..errors import KVRetError

_COMMANDS = {
    "generate": "Generate text from a prompt of any length.",
    "chat": "Talk to a model; the cache lives across turns.",
    "train": "Train retention gates for a model.",
    "eval": "Compare eviction policies on generated tasks.",
    "convert": "Convert gates from one form to another.",
    "info": "What a model or a gate folder is, and what a budget costs.",
}


class _Commands(click.Group):
    """Subcommands by name, imported when asked for; their errors are one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # the summaries stand here so that help need not import every command
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        return reported(super().invoke, ctx)


def reported(run: Any, *args: Any) -> Any:
    """Call ``run``; an error of ours ends the program with one line on stderr and status 1."""
    try:
        return run(*args)
    except KVRetError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-kvret")
def main() -> None:
    """Generate text within a fixed KV memory budget, by learned eviction.

    \b
    Try it without a download:
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64
      mlx-kvret chat --model demo --budget 64
    """


def generate_main() -> None:
    """``mlx_kvret.generate`` and ``python -m mlx_kvret.generate``."""
    from .generate import command

    reported(command.main, None, "mlx_kvret.generate")
