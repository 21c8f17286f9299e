"""safetensors with bfloat16 and without a tensor library.

numpy has no bfloat16, so a tensor is kept as its bits and widened to float32 on demand (which is exact).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from ..errors import CheckpointError
from .types import Array, Floats

_STORAGE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "U8": np.dtype("u1"),
}  # fmt: skip
FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Tensor:
    """A tensor as stored: ``dtype`` is safetensors' name, ``bits`` the numpy array that holds it."""

    dtype: str
    bits: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def float32(self) -> Floats:
        """The values, widened; exact for every float type."""
        if self.dtype == "BF16":
            return (self.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.bits.astype(np.float32)

    @classmethod
    def of(cls, values: Array, dtype: str = "F32") -> Tensor:
        """Round float values to ``dtype`` (nearest, ties to even)."""
        if dtype != "BF16":
            return cls(dtype, np.asarray(values, _STORAGE[dtype], order="C"))
        values = np.asarray(values, np.float32, order="C")
        raw = values.view(np.uint32)
        rounded = raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))
        # rounding up carries some NaN over into zero
        bits = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded) >> np.uint32(16)
        return cls(dtype, bits.astype("<u2"))

    def cast(self, dtype: str) -> Tensor:
        """The same values in another float type; the very same tensor when the type is unchanged."""
        return self if dtype == self.dtype else Tensor.of(self.float32(), dtype)


def tensors_id(tensors: dict[str, Tensor]) -> str:
    """A short name for the exact content of named tensors: 12 hexadecimal digits of a SHA-256."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape};".encode())
        digest.update(np.ascontiguousarray(tensors[name].bits).tobytes())
    return digest.hexdigest()[:12]


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a damaged or truncated file raises CheckpointError."""
    return read_file(path)[0]


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As :func:`read_tensors`, with the texts of the header's ``__metadata__``."""
    path = Path(path)
    try:
        content = path.read_bytes()
        stored = deserialize(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the path, or copy the files again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); copy or make it again"
        ) from error
    tensors = {}
    for name, entry in stored:
        if entry["dtype"] not in _STORAGE:
            raise CheckpointError(
                f"tensor {name} in {path} has type {entry['dtype']}; expected one of {', '.join(_STORAGE)}"
            )
        bits = np.frombuffer(entry["data"], _STORAGE[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = Tensor(entry["dtype"], bits)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file: 8 bytes of header length, the header as JSON, then the raw data."""
    # wide types first, so that each tensor begins at a multiple of its item size: readers map them in place
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].bits.itemsize))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.bits.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.bits).tobytes())
