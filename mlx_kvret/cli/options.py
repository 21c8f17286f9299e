"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from ..core.config import Policy, Scope
from ..core.request import EVICTION, Sampling, check_eviction, check_max_tokens

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """``--model --gates --backend``."""
    for option in (
        click.option("--backend", default="auto", show_default=True,
                     type=click.Choice(["auto", "mlx", "cuda", "torch"]), help="What runs the model."),
        click.option("--gates", default="auto", show_default=True,
                     help="Folder or hub id of the retention gates; auto: those known for the model; none."),
        click.option("--model", required=True,
                     help="Model folder, hub id (org/name), or a name: demo, smollm2."),
    ):  # fmt: skip
        function = option(function)
    return function


def eviction_options(function: F) -> F:
    """``--budget`` and what else decides what is kept; collected by :func:`eviction`.

    Gates may carry defaults of their own for what is not given.
    """
    for option in (
        click.option("--policy-seed", type=int, help="Of the random policy."),
        click.option("--threshold", type=float,
                     help="Drop entries of less predicted use than this even within the budget; try 1e-6. "
                     "0: none, whatever the gates' own default is."),
        click.option("--lookahead", type=int, help="Steps over which future use is summed.  [default: 1]"),
        click.option("--window", type=int,
                     help="Most recent positions, never evicted.  [default: the gates' own]"),
        click.option("--sinks", type=int, help="First positions, never evicted.  [default: the gates' own]"),
        click.option("--min-per-head", type=int,
                     help="Entries that every head keeps first.  [default: the gates' own]"),
        click.option("--scope", type=click.Choice(get_args(Scope)),
                     help="Who competes.  [default: the gates' own, else global]"),
        click.option("--policy", type=click.Choice(get_args(Policy)), default="learned", show_default=True,
                     help="What decides who stays."),
        click.option("--buffer", type=int, help="Tokens per head over the budget before a compaction."
                     "  [default: budget/8]"),
        click.option("--budget", default="1024", show_default=True,
                     help="Tokens per KV head, or memory: 256MB, 1.5GiB."),
    ):  # fmt: skip
        function = option(function)
    return function


def eviction(options: dict[str, Any]) -> dict[str, Any]:
    """Take the eviction options that were given out of a command's keywords; a threshold of 0 is none.

    Raises:
        ConfigError: options that cannot work, told before a model is loaded.
    """
    found = {name: options.pop(name) for name in EVICTION}
    given = {name: value for name, value in found.items() if value is not None}
    given |= {"threshold": None} if given.get("threshold") == 0 else {}
    check_eviction(given)
    return given


def check_sampling(options: dict[str, Any]) -> None:
    """Refuse what :func:`sampling_options` gave and cannot work, before a model is loaded."""
    Sampling(options["temp"], options["top_p"], options["seed"])
    check_max_tokens(options["max_tokens"])


def sampling_options(function: F) -> F:
    """``--max-tokens`` and how the next token is drawn."""
    for option in (
        click.option("--seed", type=int, help="Make sampling repeatable."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling."),
        click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy."),
        click.option("--max-tokens", type=int, default=256, show_default=True, help="Most new tokens."),
    ):  # fmt: skip
        function = option(function)
    return function
