"""The shared gate checkpoint: one folder that every backend reads.

``gates.safetensors``  the tensors of :meth:`GateConfig.tensor_shapes`, and their checksum
``kvret.json``         {"format": "kvret-gates", "version": 1, "gates": GateConfig, "provenance": {...}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, ModelMismatchError
from .config import GateConfig
from .files import whole_folder
from .fingerprint import differences, fingerprint
from .reading import exactly, read_json_value
from .tensors import FLOATS, Tensor, read_tensors, write_tensors
from .types import Array

FORMAT, VERSION = "kvret-gates", 1
CONFIG_FILE, TENSOR_FILE = "kvret.json", "gates.safetensors"


@dataclass(frozen=True)
class GateCheckpoint:
    """Gates in memory: configuration, tensors by name, and where they come from."""

    config: GateConfig
    tensors: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = self.config.tensor_shapes()
        check_tensors(self.tensors, {name: (shape, FLOATS) for name, shape in shapes.items()})

    def layer(self, index: int) -> dict[str, Array]:
        """The float32 weights of one layer: ``linear1.weight`` … and ``bias``, shared ones included."""
        weights = {}
        for name in self.config.tensor_shapes():
            owner, _, rest = name.removeprefix("layers.").partition(".")
            if owner in (str(index), "shared"):
                weights[rest] = self.tensors[name].float32()
        return weights

    def uniform(self) -> dict[str, Tensor]:
        """The tensors as stored; where maps differ in type, all maps in float32, which holds each exactly."""
        maps = [name for name in self.tensors if "linear" in name]
        if len({self.tensors[name].dtype for name in maps}) == 1:
            return self.tensors
        return self.tensors | {name: self.tensors[name].cast("F32") for name in maps}

    def check_model(self, model_config: dict[str, Any], what: str = "the model") -> None:
        """As :func:`check_base`."""
        check_base(self.config, model_config, what)


def check_base(gates: GateConfig, model_config: dict[str, Any], what: str = "the model") -> None:
    """Refuse a base model other than the one that gates were trained for.

    Raises:
        ModelMismatchError: names every field that differs.
    """
    ours = f"{gates.base_fingerprint} hidden_size={gates.hidden_size}"
    if wrong := differences(ours, fingerprint(model_config)):
        raise ModelMismatchError(
            f"these gates belong to another model ({gates.base_model or 'unnamed'}) than {what}: "
            f"{'; '.join(wrong)}; give gates trained for this model"
        )


def save_gates(
    folder: str | os.PathLike[str],
    config: GateConfig,
    tensors: Mapping[str, Array | Tensor],
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all. Plain arrays are stored as float32."""
    stored = {name: t if isinstance(t, Tensor) else Tensor.of(t) for name, t in tensors.items()}
    checkpoint = GateCheckpoint(config, stored, provenance or {})
    with whole_folder(folder) as scratch:
        write_json(scratch / CONFIG_FILE, manifest(config, checkpoint.provenance))
        write_tensors(scratch / TENSOR_FILE, {name: stored[name] for name in config.tensor_shapes()})


def load_gates(folder: str | os.PathLike[str]) -> GateCheckpoint:
    """Read and validate a checkpoint folder.

    Raises:
        CheckpointError: not a checkpoint, damaged, another version, wrong names, shapes, types, or NaN.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with {CONFIG_FILE} and {TENSOR_FILE}")
    config, provenance, form = read_manifest(folder)
    if form != "shared":
        raise CheckpointError(
            f"{folder} holds gates in the {form!r} form; convert them with `mlx-kvret convert --to shared`"
        )
    return GateCheckpoint(config, read_tensors(folder / TENSOR_FILE), provenance)


def manifest(config: GateConfig, provenance: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """The content of ``kvret.json``; a backend's own form adds ``form`` and what it needs."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **extra,
        "gates": config.to_dict(),
        "provenance": provenance,
    }


def read_manifest(folder: Path) -> tuple[GateConfig, dict[str, Any], str]:
    """Configuration, provenance and form (``"shared"``, ``"mlx"`` …) from ``kvret.json``, validated."""
    path = folder / CONFIG_FILE
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {data.get('format')!r}; expected {FORMAT!r}")
    if not exactly(data.get("version"), VERSION):
        raise CheckpointError(
            f"{path} has version {data.get('version')!r}; this release reads version {VERSION}; "
            "convert the gates again or update mlx-kvret"
        )
    try:
        config = GateConfig.from_dict(data.get("gates", {}))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    provenance = data.get("provenance", {})
    if not isinstance(provenance, dict):
        raise CheckpointError(f"{path}: provenance is {provenance!r}; expected an object")
    form = data.get("form", "shared")
    if not isinstance(form, str):
        raise CheckpointError(f"{path}: form is {form!r}; expected a text")
    return config, provenance, form


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint or a model's folder.

    Raises:
        CheckpointError: missing, broken, or no object.
    """
    # a model's config may hold infinity, and so the provenance of gates that carry it
    data = read_json_value(path, infinity=True)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected an object")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], Sequence[str]]]
) -> None:
    """Check tensors against the shape and the allowed types expected under each name.

    Raises:
        CheckpointError: missing or unexpected names, another shape or type, NaN or infinity.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [
            f"{what} {_some(names)}" for what, names in (("missing", missing), ("unexpected", extra)) if names
        ]
        raise CheckpointError(
            f"gate tensors do not fit the configuration: {'; '.join(parts)}; copy or convert the gates again"
        )
    for name, (shape, types) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(f"gate tensor {name} has shape {tensor.shape}; expected {shape}")
        if tensor.dtype not in types:
            raise CheckpointError(f"gate tensor {name} has type {tensor.dtype}; expected {', '.join(types)}")
        if not tensor.finite:
            raise CheckpointError(
                f"gate tensor {name} holds NaN or infinity; the file is damaged or its training run failed"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
