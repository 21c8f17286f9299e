"""Gates as MLX loads them: in one float type, or with their large maps in 8 bits.

``kvret.json``         the shared manifest with "form": "mlx", "dtype" and "quantization"
``gates.safetensors``  the parameters of the MLX backend's :class:`RetentionGates`, by their own names
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

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
from mlx_kvret.core.reading import exactly
from mlx_kvret.core.tensors import FLOATS, Tensor, read_tensors, write_tensors
from mlx_kvret.errors import CheckpointError, ConfigError
from mlx_kvret.mlx_backend.gates import RetentionGates, from_checkpoint, to_array, to_tensor

from .casting import DTYPES, common_dtype

BITS = 8
GROUP_SIZES = (128, 64, 32)


def to_mlx(checkpoint: GateCheckpoint, bits: int | None = None) -> RetentionGates:
    """Gates as they will run: each tensor in the type it is stored in, the large maps in 8 bits if asked.

    Raises:
        ConfigError: ``bits`` is neither None nor 8, or no group size divides the gates' rows.
    """
    if bits not in (None, BITS):
        raise ConfigError(f"bits is {bits!r}; expected {BITS}, or nothing to store a float type")
    gates = from_checkpoint(checkpoint)
    if bits:
        _quantize(gates, group_size(checkpoint.config))
    return gates


def save_mlx(folder: str | os.PathLike[str], gates: RetentionGates, provenance: dict[str, Any]) -> None:
    """Write a folder in the MLX form, whole or not at all."""
    tensors = {name: to_tensor(array) for name, array in _parameters(gates).items()}
    content = manifest(
        gates.config, provenance, form="mlx", dtype=common_dtype(tensors), quantization=quantization(gates)
    )
    with whole_folder(folder) as scratch:
        write_json(scratch / CONFIG_FILE, content)
        write_tensors(scratch / TENSOR_FILE, tensors)


def load_mlx_gates(folder: str | os.PathLike[str]) -> RetentionGates:
    """Gates from a folder in the MLX form, frozen.

    Raises:
        CheckpointError: another form, damaged, wrong names, shapes or types, NaN.
    """
    return _load(Path(folder).expanduser())[0]


def load_mlx(folder: str | os.PathLike[str]) -> GateCheckpoint:
    """A folder in the MLX form as a shared checkpoint: exact for float types, dequantised for 8 bits.

    Raises as :func:`load_mlx_gates`.
    """
    gates, provenance = _load(Path(folder).expanduser())
    if stored := quantization(gates):
        provenance = provenance | {"dequantized_from": stored}
    return GateCheckpoint(gates.config, dequantize(gates), provenance)


def dequantize(gates: RetentionGates) -> dict[str, Tensor]:
    """The tensors of a shared checkpoint, those of 8-bit maps in the type of their scales."""
    arrays = _parameters(gates)
    for path, module in gates.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            arrays[f"{path}.weight"] = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
    return {name: to_tensor(arrays[name]) for name in gates.config.tensor_shapes()}


def group_size(config: GateConfig) -> int:
    """Weights per scale: the largest of 128, 64 and 32 that divides the rows of all quantised maps."""
    for size in GROUP_SIZES:
        if _divides(size, config):
            return size
    raise ConfigError(
        f"gates of hidden size {config.hidden_size} and width {config.width} cannot be stored in {BITS} "
        f"bits: both must be multiples of {GROUP_SIZES[-1]}; store them as bfloat16"
    )


def quantization(gates: RetentionGates) -> dict[str, int] | None:
    """Bits and group size of quantised gates, else None."""
    for _, module in gates.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            return {"bits": module.bits, "group_size": module.group_size}
    return None


def _divides(size: int, config: GateConfig) -> bool:
    return config.hidden_size % size == 0 and config.width % size == 0


def _quantize(gates: RetentionGates, size: int) -> None:
    # the last projection ranks the entries and is below 2 % of the weights: it stays as it is
    last = gates.config.projections[-1]
    nn.quantize(
        gates,
        group_size=size,
        bits=BITS,
        class_predicate=lambda path, module: isinstance(module, nn.Linear) and not path.endswith(last),
    )
    gates.freeze()


def _load(folder: Path) -> tuple[RetentionGates, dict[str, Any]]:
    config, provenance, form = read_manifest(folder)
    if form != "mlx":
        raise CheckpointError(f"{folder} holds gates in the {form!r} form; expected the 'mlx' form")
    more = read_json(folder / CONFIG_FILE)
    dtype, stored = more.get("dtype"), more.get("quantization")
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"{folder} has dtype {dtype!r}; expected null or one of {', '.join(DTYPES)}")
    if stored is not None:
        sizes = [size for size in GROUP_SIZES if _divides(size, config)]
        if not any(exactly(stored, {"bits": BITS, "group_size": size}) for size in sizes):
            raise CheckpointError(
                f"{folder} has quantization {stored!r}; expected null or {BITS} bits in groups of "
                f"{', '.join(map(str, GROUP_SIZES))} that divide hidden size and width; convert it again"
            )
    tensors = read_tensors(folder / TENSOR_FILE)
    floats = (DTYPES[dtype],) if dtype else FLOATS
    # before anything is made in the sizes of the file
    check_tensors(tensors, _expected(config, stored["group_size"] if stored else None, floats))
    gates = RetentionGates(config)
    if stored is not None:
        _quantize(gates, stored["group_size"])
    gates.load_weights([(name, _to_array(tensor)) for name, tensor in tensors.items()])
    gates.freeze()
    return gates, provenance


def _expected(
    config: GateConfig, group: int | None, floats: tuple[str, ...]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and types of every tensor of the form, by name."""
    expected = {}
    for name, shape in config.tensor_shapes().items():
        expected[name] = shape, floats
        owner, _, kind = name.rpartition(".")
        if group and kind == "weight" and not owner.endswith(config.projections[-1]):
            expected[name] = (shape[0], shape[1] * BITS // 32), ("U32",)
            for part in ("scales", "biases"):
                expected[f"{owner}.{part}"] = (shape[0], shape[1] // group), floats
    return expected


def _parameters(gates: RetentionGates) -> dict[str, mx.array]:
    return dict(tree_flatten(gates.parameters()))


def _to_array(tensor: Tensor) -> mx.array:
    return mx.array(tensor.bits) if tensor.dtype == "U32" else to_array(tensor)
