"""Checkpoints of a run: one safetensors file with all that decides how it goes on, replaced whole.

Tensors are named ``gates.*``, ``mean.*`` and ``square.*`` (weights and AdamW's two moments, under the names
of a gate checkpoint), and ``random.*`` for states of a backend's generators. The rest is JSON in the header.
So every backend can go on with what another one began.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..core.checkpoint import check_tensors
from ..core.config import GateConfig
from ..core.files import whole_file
from ..core.options import number, of_type, whole
from ..core.reading import exactly, parse_json
from ..core.tensors import Tensor, read_file, write_tensors
from ..errors import CheckpointError, ConfigError, KVRetError, TrainingError
from .config import differences
from .report import Losses

NAME = "training.safetensors"
VERSION = 1
_KEY = "kvret-training"
# weights and AdamW's moments
_KINDS = ("gates", "mean", "square")
# the longest state of a generator is torch's, of 5,056 bytes
_LONGEST_STATE = 1 << 16


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
    settings, values, tensors = read(folder)
    if wrong := differences(json.loads(json.dumps(run)), settings):
        raise ConfigError(
            f"the run in {folder} had other settings: {'; '.join(wrong)}; resume with those, or start in "
            "another folder"
        )
    return values, tensors


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """The settings, values and tensors of the checkpoint in a folder. Raises as :func:`load`."""
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"there is no {NAME} in {folder}; leave out --resume to start a run there")
    try:
        tensors, metadata = read_file(path)
        header = parse_json(metadata[_KEY])
        of_type("the header", header, dict, "an object")
        version, settings, values = header["version"], header["run"], header["values"]
        if exactly(version, VERSION):
            of_type("run", settings, dict, "an object")
            _check_values(values)
    except (KVRetError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); start again elsewhere") from error
    if not exactly(version, VERSION):
        raise CheckpointError(f"{path} has version {version}; this release resumes version {VERSION}")
    return settings, values, tensors


def check(folder: Path, tensors: dict[str, Tensor], step: int, gates: GateConfig) -> None:
    """Refuse tensors that are not the state of these gates after so many steps.

    Raises:
        CheckpointError: missing or unexpected names, other shapes or types, NaN, infinity, negative squares.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}
    # there are no moments before the first step, or zeros
    kinds = _KINDS if step or len(own) > len(gates.tensor_shapes()) else _KINDS[:1]
    shapes = {f"{kind}.{name}": shape for kind in kinds for name, shape in gates.tensor_shapes().items()}
    try:
        check_tensors(own, {name: (shape, ("F32",)) for name, shape in shapes.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{folder / NAME} is damaged ({error}); start again elsewhere") from error
    wrong = [name for name in own if name.startswith("square.") and (own[name].bits < 0).any()]
    states = [(name, tensors[name]) for name in tensors.keys() - own.keys()]
    wrong += [
        name for name, t in states if t.dtype != "U8" or len(t.shape) != 1 or t.bits.size > _LONGEST_STATE
    ]
    if wrong:
        raise CheckpointError(
            f"{folder / NAME} is damaged ({wrong[0]} holds what it cannot hold); start again elsewhere"
        )


def _check_values(values: Any) -> None:
    of_type("values", values, dict, "an object")
    for name in ("step", "tokens"):
        whole(name, values[name], 0)
    losses, position = values["losses"], values["position"]
    if losses is not None:
        names = [field.name for field in dataclasses.fields(Losses)]
        if not isinstance(losses, dict) or sorted(losses) != sorted(names):
            raise ConfigError(f"losses is {losses!r:.80}; expected {', '.join(names)}")
        for name in names:
            number(name, losses[name], "a finite number")
    if not isinstance(position, list) or len(position) != 4:
        raise ConfigError(f"position is {position!r:.80}; expected four numbers")
    for name, value in zip(("epoch", "record", "piece"), position, strict=False):
        whole(name, value, 0)
    number("share", position[3], "a share", 0, 1)
