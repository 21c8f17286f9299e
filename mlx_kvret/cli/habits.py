"""Flags that people bring with them: those of mlx-lm that have no place here, and our own older names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., Any])

_BITS = "entries are stored in few bits once, when they are kept; --kv-bits says in how many"
# flags of mlx_lm.generate and mlx_lm.chat that both commands refuse, and why
REFUSED = {
    "--max-kv-size": "give --budget, tokens per KV head or memory (256MB); --policy recent keeps what "
    "mlx-lm's rotating cache does",
    "--kv-group-size": _BITS,
    "--quantized-kv-start": _BITS,
    "--prompt-cache-file": "give --cache, a file of `mlx-kvret read` or of /save in a chat; mlx-lm's own "
    "files are read from Python, by its load_prompt_cache for an attached model",
    "--use-default-chat-template": "neither mlx_lm.generate nor transformers has a default template; put a "
    "chat_template.jinja into the model's folder",
    "--pipeline": "in processes of mlx.launch, `generate --split layers` does it; a chat runs in one process",
    "--quantize-activations": "its layers do not run on CPUs and were not tried with a bounded cache; from "
    "Python, load the model with model_config={'quantize_activations': True}",
}
# older names of our own flags, and what they are called now
RENAMED = {
    "--system": "--system-prompt",
    "--raw": "--ignore-chat-template",
    "--chunk": "--prefill-step-size",
    "--stats": "--verbose",
}
_SWITCHES = {"--use-default-chat-template", "--quantize-activations", "--pipeline", "--raw", "--stats"}
SHORT = {"--quantize-activations": "-qa"}


def refusals(function: F) -> F:
    """Have a command say what to use instead of each flag in :data:`REFUSED`."""
    for flag, why in REFUSED.items():
        names = [flag, SHORT[flag]] if flag in SHORT else [flag]
        refuse = functools.partial(_refuse, f"{flag} of mlx-lm has no place here: {why}")
        function = click.option(
            *names, hidden=True, is_eager=True, expose_value=False, callback=refuse, **_kind(flag)
        )(function)
    return function


def _kind(flag: str) -> dict[str, Any]:
    return {"is_flag": True} if flag in _SWITCHES else {"type": int if flag == "--chunk" else str}


def _refuse(why: str, context: click.Context, _: click.Parameter, value: Any) -> None:
    if value not in (None, False):
        raise click.UsageError(why, context)


def older_names(*flags: str) -> Callable[[F], F]:
    """Have a command take some of :data:`RENAMED` for one release more, with a hint on stderr."""

    def decorate(function: F) -> F:
        def run(**options: Any) -> Any:
            for old in flags:
                _rename(old, RENAMED[old], options)
            return function(**options)

        wrapped: Any = functools.update_wrapper(run, function)
        for old in flags:
            wrapped = click.option(old, hidden=True, **_kind(old))(wrapped)
        found: F = wrapped
        return found

    return decorate


def _rename(old: str, new: str, options: dict[str, Any]) -> None:
    before, after = (flag.strip("-").replace("-", "_") for flag in (old, new))
    given = options.pop(before)
    if given in (None, False):
        return
    context = click.get_current_context()
    if context.get_parameter_source(after) is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"{old} is the older name of {new}; give one of them", context)
    click.echo(f"note: {old} is called {new} now, as in mlx-lm; {old} will go", err=True)
    options[after] = given
