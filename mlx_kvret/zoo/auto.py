"""Gates for a loaded model, found by themselves: ``gates="auto"``.

Only gates of a model that surely is their base are taken, and one line in the log says which. What has the
shape but not the proof is named with the option that takes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import demo
from ..errors import CheckpointError, ConfigError, MissingDependencyError, ModelMismatchError
from ..hub import resolve
from .identity import Subject
from .known import Entry, entries

AUTO = "auto"
FREE = "recent, knorm, keydiff, random, full"
_LOG = logging.getLogger("mlx_kvret")


@dataclass(frozen=True)
class Match:
    """Known gates that have the model's shape; ``sure`` if the model is their base, and ``why``."""

    entry: Entry
    sure: bool
    why: str

    def __str__(self) -> str:
        return f"{self.entry} ({self.why})"


def matches(subject: Subject) -> list[Match]:
    """Known gates of the model's shape, the sure and preferred ones first."""
    found = [Match(entry, *subject.judge(entry.base)) for entry in entries() if subject.may_be(entry.base)]
    return sorted(found, key=lambda match: not match.sure)


def choose(subject: Subject) -> tuple[str, Path] | None:
    """A label and the folder of the gates to use, fetched if need be; None if there are none to be had.

    What is taken is logged as information; gates that exist and are not taken as a warning.
    """
    found = matches(subject)
    if not found:
        return None
    best = found[0]
    if not best.sure:
        choice = " or ".join(
            dict.fromkeys(f"{match.entry.gates} ({match.entry.base.name})" for match in found)
        )
        _LOG.warning(
            "no gates are used: there are some for models of this shape, but is it one of these? (%s) "
            "If it is a copy, name its gates: %s. Policies that need none: %s",
            best.why,
            choice,
            FREE,
        )
        return None
    try:
        folder = best.entry.folder or resolve(best.entry.gates, "gates")
    except (ConfigError, MissingDependencyError) as error:
        _LOG.warning(
            "no gates are used: those for this model cannot be had (%s). With a network, get them by "
            "`mlx-kvret get %s`. Policies that need none: %s",
            error,
            best.entry.gates,
            FREE,
        )
        return None
    # who asks for the demo asks for its gates
    _LOG.log(logging.DEBUG if folder in (demo.GATES, demo.VISION_GATES) else logging.INFO, "gates: %s", best)
    return best.entry.label, folder


def attach_best(subject: Subject, read: Callable[[Path], Any], attach: Callable[[Any], Any]) -> Any:
    """Attach a model with the gates that :func:`choose` finds, without any if there are none that fit.

    Args:
        read: gates from a folder.
        attach: hooks the model, given gates or None; its result is returned.
    """
    if (found := choose(subject)) is not None:
        try:
            return attach(read(found[1]))
        except (CheckpointError, ModelMismatchError) as error:
            _LOG.warning(
                "no gates are used: %s cannot be (%s). Policies that need none: %s", found[0], error, FREE
            )
    return attach(None)
