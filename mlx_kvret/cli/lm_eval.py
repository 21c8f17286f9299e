"""``mlx-kvret lm-eval``: EleutherAI's harness, which knows no models from outside, with ours in it."""

from __future__ import annotations

import sys

import click

from ..errors import ConfigError, KVRetError, MissingDependencyError


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Standard tasks: lm-evaluation-harness, which then knows ``--model kvret``; all options are its own.

    \b
    Examples:
      mlx-kvret lm-eval --model kvret --model_args pretrained=smollm2,budget=256 --tasks lambada_openai
      mlx-kvret lm-eval --model kvret --model_args pretrained=demo,budget=32,method=recent --tasks facts.yaml
      mlx-kvret lm-eval --help
    """
    try:
        from ..evaluation import harness
    except ImportError as error:
        raise MissingDependencyError(
            f"standard tasks need lm-evaluation-harness ({error}); run `pip install 'mlx-kvret[harness]'`"
        ) from error
    from lm_eval.__main__ import cli_evaluate

    harness.register()
    sys.argv = ["mlx-kvret lm-eval", *(arguments or ["--help"])]
    try:
        cli_evaluate()
    except KVRetError:
        raise
    except Exception as error:  # whatever it meets: its own options, its tasks, what it fetches
        raise ConfigError(f"lm-evaluation-harness stopped: {str(error) or type(error).__name__}") from error
