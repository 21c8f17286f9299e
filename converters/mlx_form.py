"""Gates as MLX loads them: in one float type, or with their large maps in 8 bits.

``kvret.json``         the shared manifest with "form": "mlx", "dtype" and "quantization"
``gates.safetensors``  the parameters of :class:`mlx_kvret.gates.RetentionGates`, by their own names
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_kvret.core.checkpoint import (
    CONFIG_FILE,
    TENSOR_FILE,
    GateCheckpoint,
    manifest,
    read_json,
    read_manifest,
    write_json,
)
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.files import whole_folder
from mlx_kvret.core.tensors import Tensor, read_tensors, write_tensors
from mlx_kvret.errors import CheckpointError, ConfigError
from mlx_kvret.gates import RetentionGates, from_checkpoint, to_array

from .casting import DTYPES, cast, common_dtype

GROUP_SIZES = (128, 64, 32)
_CODES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}


def to_mlx(checkpoint: GateCheckpoint, dtype: str | None = None, bits: int | None = None) -> RetentionGates:
    """Gates as they will run: cast (None keeps every tensor's type), then quantised if ``bits`` is 8.

    Raises:
        ConfigError: ``bits`` is neither None nor 8, or no group size divides the gates' rows.
    """
    if bits not in (None, 8):
        raise ConfigError(f"bits is {bits!r}; gates can be stored in 8 bits, or in a float type without it")
    gates = from_checkpoint(cast(checkpoint, dtype) if dtype else checkpoint)
    if bits:
        _quantize(gates, group_size(checkpoint.config))
    return gates


def save_mlx(folder: str | os.PathLike[str], gates: RetentionGates, provenance: dict[str, Any]) -> None:
    """Write a folder in the MLX form, whole or not at all."""
    tensors = {name: _to_tensor(array) for name, array in dict(tree_flatten(gates.parameters())).items()}
    content = manifest(
        gates.config, provenance, form="mlx", dtype=common_dtype(tensors), quantization=_quantization(gates)
    )
    with whole_folder(folder) as scratch:
        write_json(scratch / CONFIG_FILE, content)
        write_tensors(scratch / TENSOR_FILE, tensors)


def load_mlx_gates(folder: str | os.PathLike[str]) -> RetentionGates:
    """Gates from a folder in the MLX form, frozen.

    Raises:
        CheckpointError: another form, damaged, wrong names, shapes or types, NaN.
    """
    return _load(folder)[0]


def load_mlx(folder: str | os.PathLike[str]) -> GateCheckpoint:
    """A folder in the MLX form as a shared checkpoint: exact for float types, dequantised for 8 bits."""
    gates, provenance = _load(folder)
    if quantization := _quantization(gates):
        provenance = provenance | {"dequantized_from": quantization}
    return GateCheckpoint(gates.config, dequantize(gates), provenance)


def dequantize(gates: RetentionGates) -> dict[str, Tensor]:
    """The tensors of a shared checkpoint, those of 8-bit maps in the type of their scales."""
    tensors = {}
    for path, module in gates.named_modules():
        if not isinstance(module, nn.QuantizedLinear):
            continue
        tensors[f"{path}.weight"] = _to_tensor(
            mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
        )
    stored = dict(tree_flatten(gates.parameters()))
    return {name: tensors.get(name) or _to_tensor(stored[name]) for name in gates.config.tensor_shapes()}


def group_size(config: GateConfig) -> int:
    """Weights per scale: the largest of 128, 64 and 32 that divides the rows of all quantised maps."""
    for size in GROUP_SIZES:
        if config.hidden_size % size == 0 and config.width % size == 0:
            return size
    raise ConfigError(
        f"gates of hidden size {config.hidden_size} and width {config.width} cannot be stored in 8 bits: "
        f"both must be multiples of {GROUP_SIZES[-1]}; store them as bfloat16"
    )


def _quantize(gates: RetentionGates, size: int) -> None:
    # the last projection ranks the entries and is below 2 % of the weights: it stays as it is
    last = gates.config.projections[-1]
    nn.quantize(
        gates,
        group_size=size,
        bits=8,
        class_predicate=lambda path, module: isinstance(module, nn.Linear) and not path.endswith(last),
    )
    gates.freeze()


def _quantization(gates: RetentionGates) -> dict[str, int] | None:
    for _, module in gates.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            return {"bits": module.bits, "group_size": module.group_size}
    return None


def _load(folder: str | os.PathLike[str]) -> tuple[RetentionGates, dict[str, Any]]:
    folder = Path(folder).expanduser()
    config, provenance, form = read_manifest(folder)
    if form != "mlx":
        raise CheckpointError(f"{folder} holds gates in the {form!r} form; expected the 'mlx' form")
    more = read_json(folder / CONFIG_FILE)
    dtype, quantization = more.get("dtype"), more.get("quantization")
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"{folder} has dtype {dtype!r}; expected null or one of {', '.join(DTYPES)}")
    gates = RetentionGates(config)
    if quantization is not None:
        allowed = [{"bits": 8, "group_size": size} for size in GROUP_SIZES]
        size = quantization.get("group_size") if quantization in allowed else 0
        if not size or config.hidden_size % size or config.width % size:
            raise CheckpointError(
                f"{folder} has quantization {quantization!r}; expected null or 8 bits in groups of "
                f"{', '.join(map(str, GROUP_SIZES))} that divide hidden size and width; convert it again"
            )
        _quantize(gates, size)
    tensors = read_tensors(folder / TENSOR_FILE)
    _check(tensors, gates, DTYPES[dtype] if dtype else None)
    gates.load_weights([(name, _to_array(tensor)) for name, tensor in tensors.items()])
    gates.freeze()
    return gates, provenance


def _check(tensors: dict[str, Tensor], gates: RetentionGates, code: str | None) -> None:
    expected = dict(tree_flatten(gates.parameters()))
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"gate tensors do not fit the configuration: {', '.join(wrong[:4])} "
            f"{'missing' if wrong[0] in expected else 'unexpected'}; convert the gates again"
        )
    for name, array in expected.items():
        tensor = tensors[name]
        if tensor.shape != array.shape:
            raise CheckpointError(f"gate tensor {name} has shape {tensor.shape}; expected {array.shape}")
        packed = array.dtype == mx.uint32
        types = ["U32"] if packed else [code] if code else list(DTYPES.values())
        if tensor.dtype not in types:
            raise CheckpointError(f"gate tensor {name} has type {tensor.dtype}; expected {', '.join(types)}")
        if not packed and not np.isfinite(tensor.float32()).all():
            raise CheckpointError(f"gate tensor {name} holds NaN or infinity; convert the gates again")


def _to_array(tensor: Tensor) -> mx.array:
    return mx.array(tensor.bits) if tensor.dtype == "U32" else to_array(tensor)


def _to_tensor(array: mx.array) -> Tensor:
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return Tensor(_CODES[array.dtype], np.array(bits))
