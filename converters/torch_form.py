"""Gates with the weights of all layers stacked, as batched products in torch want them.

``kvret.json``         the shared manifest with "form": "torch" and "dtype"
``gates.safetensors``  ``linear1.weight`` (L, h, d) for the L tensors ``layers.{l}.linear1.weight``, and so on
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret.core.checkpoint import (
    CONFIG_FILE,
    TENSOR_FILE,
    GateCheckpoint,
    check_tensors,
    manifest,
    read_json,
    read_manifest,
    write_json,
)
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.files import whole_folder
from mlx_kvret.core.tensors import FLOATS, Tensor, read_tensors, write_tensors
from mlx_kvret.errors import CheckpointError, ConfigError

from .casting import DTYPES, common_dtype


def save_torch(folder: str | os.PathLike[str], checkpoint: GateCheckpoint) -> None:
    """Write a folder in the torch form, whole or not at all.

    Raises:
        ConfigError: the layers store a map in different types.
    """
    tensors = stack(checkpoint)
    content = manifest(checkpoint.config, checkpoint.provenance, form="torch", dtype=common_dtype(tensors))
    with whole_folder(folder) as scratch:
        write_json(scratch / CONFIG_FILE, content)
        write_tensors(scratch / TENSOR_FILE, tensors)


def load_torch(folder: str | os.PathLike[str]) -> GateCheckpoint:
    """A folder in the torch form as a shared checkpoint whose tensors are views into the stacked ones.

    Raises:
        CheckpointError: another form, damaged, wrong names, shapes or types, NaN.
    """
    folder = Path(folder).expanduser()
    config, provenance, form = read_manifest(folder)
    if form != "torch":
        raise CheckpointError(f"{folder} holds gates in the {form!r} form; expected the 'torch' form")
    dtype: Any = read_json(folder / CONFIG_FILE).get("dtype")
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"{folder} has dtype {dtype!r}; expected null or one of {', '.join(DTYPES)}")
    tensors, shapes = read_tensors(folder / TENSOR_FILE), config.tensor_shapes()
    floats = (DTYPES[dtype],) if dtype else FLOATS
    expected = {}
    for name, members in stacks(config).items():
        layers = () if name == members[0] else (len(members),)
        expected[name] = ((*layers, *shapes[members[0]]), floats)
    check_tensors(tensors, expected)
    return GateCheckpoint(config, unstack(config, tensors), provenance)


def stack(checkpoint: GateCheckpoint) -> dict[str, Tensor]:
    """The tensors of the torch form, bit for bit those of the layers. Raises as :func:`save_torch`."""
    stacked = {}
    for name, members in stacks(checkpoint.config).items():
        parts = [checkpoint.tensors[member] for member in members]
        types = sorted({part.dtype for part in parts})
        if len(types) > 1:
            raise ConfigError(
                f"the layers store {name} as {' and '.join(types)}, the torch form holds them in one tensor; "
                "give one dtype for all"
            )
        bits = parts[0].bits if name == members[0] else np.stack([part.bits for part in parts])
        stacked[name] = Tensor(types[0], bits)
    return stacked


def unstack(config: GateConfig, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a shared checkpoint, views into the stacked ones."""
    tensors: dict[str, Tensor] = {}
    for name, members in stacks(config).items():
        whole = stacked[name]
        rows = [whole.bits] if name == members[0] else whole.bits
        tensors |= {member: Tensor(whole.dtype, bits) for member, bits in zip(members, rows, strict=True)}
    return tensors


def stacks(config: GateConfig) -> dict[str, list[str]]:
    """Each name in the torch form with the names it stands for in the shared one, by layer."""
    found: dict[str, list[str]] = {}
    for name in config.tensor_shapes():
        # what is shared is there once and keeps its name
        own = name.split(".", 2)[2] if name.startswith("layers.") else name
        found.setdefault(own, []).append(name)
    return found
