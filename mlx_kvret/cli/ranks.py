"""Commands in several processes at once, started by ``mlx.launch`` or ``torchrun``: the first one speaks."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ..core.launched import Launched, launched
from ..errors import ConfigError

# what a model that several processes hold can be used for, and what one process does for all
TOGETHER, FIRST = ("generate", "read", "ask", "chat", "serve"), ("convert", "get", "plan", "info")
# launched on its own terms
APART = ("train",)


def prepare(command: str) -> Launched | None:
    """Have a process that is not the first one say nothing but errors.

    Raises:
        UsageError: the command knows one process only.
        Exit: the first process does it alone.
    """
    found = launched()
    if found is None or command in APART:
        return None
    if command not in (*TOGETHER, *FIRST):
        raise click.UsageError(
            f"`mlx-kvret {command}` runs in one process, and {found.launcher} has started several; of a "
            f"model that several hold, use {', '.join(TOGETHER)}"
        )
    if found.rank:
        _silence()
        if command in FIRST:
            raise click.exceptions.Exit(0)
    return found


def _silence() -> None:
    """Nothing more on standard output; errors still come, see :func:`.ending.tell`."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    sys.stdout = nowhere
    sys.stderr = nowhere


def loading(options: dict[str, Any], split: str | None) -> dict[str, Any]:
    """Options of :func:`mlx_kvret.load` that split the model over the processes there are.

    ``options["backend"]`` becomes the launcher's.

    Raises:
        ConfigError: it is another one; or there is one process only.
    """
    found = launched()
    if found is None:
        if split is not None:
            raise ConfigError(
                "--split is for several processes, and this is one; start them with "
                "`mlx.launch -n 2 python -m mlx_kvret.generate ...`"
            )
        return {}
    backends = ("mlx",) if found.backend == "mlx" else ("torch", "cuda")
    if options["backend"] == "auto":
        options["backend"] = _torch() if found.backend == "torch" else "mlx"
    if options["backend"] not in backends:
        raise ConfigError(
            f"{found.launcher} starts processes of {found.backend}, and --backend is {options['backend']}; "
            f"give --backend {backends[0]}, or none"
        )
    return {"parallel": "pipeline" if split == "layers" else "tensor"}


def _torch() -> str:
    from ..api import backends

    return "cuda" if backends()["cuda"] == "ok" else "torch"


def first() -> bool:
    """Whether this process is the one that writes files."""
    found = launched()
    return found is None or found.rank == 0


def check_stdin(*names: str | None) -> None:
    """Refuse to read what only one of several processes is given.

    Raises:
        ConfigError: a name is '-'.
    """
    found = launched()
    if found is not None and "-" in names:
        raise ConfigError(
            f"standard input cannot be read by all processes of {found.launcher}; write the text to a file"
        )
