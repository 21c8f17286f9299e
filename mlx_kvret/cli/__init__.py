"""The command line: ``mlx-kvret COMMAND``. A command's module is imported when it is run."""

from __future__ import annotations

try:
    import functools
    import importlib
    import sys
    from typing import Any

    import click

    from . import ranks
    from .ending import ended, explained, leaving_at_once
    from .notices import notices
except KeyboardInterrupt:
    raise SystemExit(130) from None

_COMMANDS = {
    "generate": "Generate text from a prompt of any length.",
    "chat": "Talk to a model; the cache lives across turns.",
    "serve": "Answer OpenAI's clients within a fixed KV memory.",
    "read": "Read long texts once, and save what is remembered.",
    "ask": "Ask many questions about one reading.",
    "inspect": "Draw what is kept of a text, as a page for a browser.",
    "train": "Train retention gates for a model.",
    "eval": "Compare eviction policies on generated tasks.",
    "lm-eval": "Standard tasks by lm-evaluation-harness, with our model in it.",
    "convert": "Convert gates from one form to another.",
    "get": "Fetch a real model to try, or released gates.",
    "plan": "Which budget, and how many conversations, fit into a memory.",
    "info": "What a model, a gate folder or a saved cache is, and what a budget costs.",
}


class _Commands(click.Group):
    """Subcommands by name, imported when asked for; all of them end as :mod:`.ending` says."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        with leaving_at_once():
            module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # the summaries stand here so that help need not import every command
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run = functools.partial(super().main, *args, standalone_mode=False, **extra)
        return ended(run) if standalone_mode else run()

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with explained():
            for argument in args:
                if not argument.isascii() and any("\ud800" <= c <= "\udfff" for c in argument):
                    raise click.UsageError(f"{argument!r} is not valid UTF-8; convert it, or rename the file")
            return super().make_context(info_name, args, parent, **extra)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        ranks.prepare(found[0] or "")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        with explained(), notices():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-kvret")
def main() -> None:
    """Generate text within a fixed KV memory budget, by learned eviction.

    \b
    Try it without a download:
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64
      mlx-kvret chat --model demo --budget 64
    and with a real model of 93 MB:
      mlx-kvret get smollm2
      mlx-kvret chat --model smollm2 --budget 256
    """


def generate_main() -> None:
    """``mlx_kvret.generate`` and ``python -m mlx_kvret.generate``."""
    main(["generate", *sys.argv[1:]], prog_name="mlx-kvret")
