"""Checkpoints of a run: one file with all that decides how it goes on, replaced whole."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_kvret.core.files import whole_file
from mlx_kvret.errors import CheckpointError, ConfigError, TrainingError
from mlx_kvret.training.config import differences

NAME = "training.pt"
VERSION = 1


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint in a folder; a crash or a full disk leaves the one before.

    Raises:
        TrainingError: it cannot be written.
    """
    # torch reports a full disk as a RuntimeError of its archive writer, so it writes to memory first
    buffer = io.BytesIO()
    torch.save(state | {"version": VERSION, "random": _random_state()}, buffer)
    try:
        with whole_file(folder / NAME) as scratch:
            scratch.write_bytes(buffer.getbuffer())
    except ConfigError as error:
        raise TrainingError(
            f"{error}; the checkpoint before is whole, make room and go on with --resume"
        ) from error


def load(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint in a folder, for a run with these settings.

    Raises:
        ConfigError: there is none, or it is of a run with other settings.
        CheckpointError: it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"there is no {NAME} in {folder} to resume; leave out --resume to start there")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version, settings = state["version"], state["run"]
    except Exception as error:  # a damaged archive raises all sorts of things
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); start again elsewhere") from error
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}; this release resumes version {VERSION}")
    if wrong := differences(run, settings):
        raise ConfigError(
            f"the run in {folder} had other settings: {'; '.join(wrong)}; resume with those, or start in "
            "another folder"
        )
    return state


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while writing has left: hidden scratch files and folders."""
    for scratch in folder.glob(".*"):
        if scratch.is_dir():
            shutil.rmtree(scratch)
        else:
            scratch.unlink()


def _random_state() -> dict[str, Any]:
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set every generator as it was when the checkpoint was written (its ``random``)."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
