"""The forms of a gate folder: told apart, and read in any of them."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_kvret.core.checkpoint import CONFIG_FILE, GateCheckpoint, load_gates, read_manifest
from mlx_kvret.core.installed import command_for, installed
from mlx_kvret.errors import CheckpointError, MissingDependencyError

from . import torch_form, trimkv

FORMS = ("shared", "mlx", "torch", "trimkv")
# those told apart by their manifest
OURS = FORMS[:3]


def detect(folder: str | os.PathLike[str]) -> str:
    """The form of a gate folder, one of :data:`FORMS`.

    Raises:
        CheckpointError: no folder, none of the forms, or two of them at once.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with retention gates")
    ours, theirs = (folder / CONFIG_FILE).exists(), (folder / trimkv.WEIGHT_FILE).exists()
    if ours and theirs:
        raise CheckpointError(
            f"{folder} holds {CONFIG_FILE} and {trimkv.WEIGHT_FILE}; keep one form in a folder"
        )
    if theirs:
        return "trimkv"
    if not ours:
        raise CheckpointError(
            f"{folder} holds no retention gates; expected {CONFIG_FILE} ({', '.join(OURS)}) or "
            f"{trimkv.WEIGHT_FILE} (trimkv)"
        )
    form = read_manifest(folder)[2]
    if form not in OURS:
        raise CheckpointError(f"{folder} has form {form!r}; expected one of {', '.join(OURS)}")
    return form


def load_any(folder: str | os.PathLike[str]) -> GateCheckpoint:
    """Gates from a folder in any form; 8-bit ones are dequantised.

    Raises:
        CheckpointError: the folder cannot be used.
    """
    form = detect(folder)
    if form == "trimkv":
        return trimkv.load_trimkv(folder)
    if form == "shared":
        return load_gates(folder)
    if form == "torch":
        return torch_form.load_torch(folder)
    need_mlx()
    from .mlx_form import load_mlx

    return load_mlx(folder)


def need_mlx() -> None:
    if not installed("mlx"):
        raise MissingDependencyError(
            f"gates in the mlx form are read and written by mlx; run `{command_for('mlx')}`, or convert them "
            "to shared where it is installed"
        )
