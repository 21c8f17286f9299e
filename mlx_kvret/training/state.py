"""Checkpoints of a run: one safetensors file with all that decides how it goes on, replaced whole.

Tensors are named ``gates.*``, ``mean.*`` and ``square.*`` (weights and AdamW's two moments, under the names
of a gate checkpoint), and ``random.*`` for states of a backend's generators. The rest is JSON in the header.
So every backend can go on with what another one began.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..core.files import whole_file
from ..core.tensors import Tensor, read_file, write_tensors
from ..errors import CheckpointError, ConfigError, TrainingError
from .config import differences

NAME = "training.safetensors"
VERSION = 1
_KEY = "kvret-training"


def save(folder: Path, run: dict[str, Any], values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace the checkpoint in a folder; a crash or a full disk leaves the one before.

    Args:
        run: settings that a resumed run must share.
        values: numbers and lists, for JSON.

    Raises:
        TrainingError: it cannot be written.
    """
    header = json.dumps({"version": VERSION, "run": run, "values": values})
    try:
        with whole_file(folder / NAME) as scratch:
            write_tensors(scratch, tensors, {_KEY: header})
    except ConfigError as error:
        raise TrainingError(
            f"{error}; the checkpoint before is whole, make room and go on with --resume"
        ) from error


def load(folder: Path, run: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values and tensors of the checkpoint in a folder, for a run with these settings.

    Raises:
        ConfigError: there is none, or it is of a run with other settings.
        CheckpointError: it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"there is no {NAME} in {folder} to resume; leave out --resume to start there")
    try:
        tensors, metadata = read_file(path)
        header = json.loads(metadata[_KEY])
        version, settings, values = header["version"], header["run"], header["values"]
    except (CheckpointError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); start again elsewhere") from error
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}; this release resumes version {VERSION}")
    if wrong := differences(json.loads(json.dumps(run)), settings):
        raise ConfigError(
            f"the run in {folder} had other settings: {'; '.join(wrong)}; resume with those, or start in "
            "another folder"
        )
    return values, tensors


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while writing has left: hidden scratch files and folders."""
    for scratch in folder.glob(".*"):
        if scratch.is_dir():
            shutil.rmtree(scratch)
        else:
            scratch.unlink()
