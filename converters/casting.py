"""Gates in another float type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import ConfigError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def cast(checkpoint: GateCheckpoint, dtype: str) -> GateCheckpoint:
    """All tensors rounded to ``float32``, ``bfloat16`` or ``float16``; those of that type stay as they are.

    Raises:
        ConfigError: unknown type, or a value beyond its range.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors)


def common_dtype(tensors: Mapping[str, Tensor]) -> str | None:
    """The one float type of all tensors, or None if there are several (integers do not count)."""
    found = {t.dtype for t in tensors.values()} & set(DTYPES.values())
    return next((name for name, code in DTYPES.items() if {code} == found), None)


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    with np.errstate(over="ignore"):
        result = tensor.cast(DTYPES[dtype])
    if not np.isfinite(result.float32()).all():
        raise ConfigError(f"gate tensor {name} holds values beyond the range of {dtype}; use float32")
    return result
