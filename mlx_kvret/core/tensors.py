"""safetensors with bfloat16, a checksum, and without a tensor library.

numpy has no bfloat16, so a tensor is kept as its bits and widened to float32 on demand (which is exact).
What is written carries the checksum of all its tensors and texts in ``__metadata__``; files without one, by
other programs or earlier releases, are read as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from ..errors import CheckpointError
from .reading import parse_json, read_bytes
from .types import Array, Floats

CHECKSUM = "checksum"
_STORAGE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "U8": np.dtype("u1"),
}  # fmt: skip
FLOATS = ("F32", "BF16", "F16")
# the bits of the exponent, all of them set in NaN and infinity only
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


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

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        mask = _EXPONENT.get(self.dtype)
        if mask is None:
            return True
        raw = np.ascontiguousarray(self.bits).view(f"<u{self.bits.itemsize}")
        return not bool(((raw & raw.dtype.type(mask)) == mask).any())

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


def tensors_id(tensors: Mapping[str, Tensor]) -> str:
    """A short name for the exact content of named tensors: 12 hexadecimal digits of a SHA-256."""
    return _digest(tensors)[:12]


def checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> str:
    """SHA-256 over names, types, shapes and values, and over a header's texts, as ``"sha256:…"``."""
    return f"sha256:{_digest(tensors, texts or {})}"


def verify(
    path: str | os.PathLike[str], stored: object, tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> None:
    """Compare with the checksum that was ``stored`` in a file.

    Raises:
        CheckpointError: the content is not what was written.
    """
    if stored != (found := checksum(tensors, texts)):
        raise CheckpointError(
            f"{path} is damaged or was changed: its content has the checksum {found[:19]}…, it was written "
            f"with {str(stored)[:19]}…; copy it again, or make it again"
        )


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape};".encode())
        # as it lies in memory: a copy of a large cache would double it
        digest.update(np.ascontiguousarray(tensors[name].bits).reshape(-1).view(np.uint8).data)
    if texts:
        digest.update(json.dumps(texts, sort_keys=True).encode())
    return digest.hexdigest()


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a damaged or truncated file raises CheckpointError."""
    return read_file(path)[0]


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As :func:`read_tensors`, with the texts of the header's ``__metadata__`` but for the checksum."""
    path = Path(path)
    content = read_bytes(path)
    try:
        stored = deserialize(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); copy or make it again"
        ) from error
    tensors = {}
    for name, entry in stored:
        if entry["dtype"] not in _STORAGE:
            raise CheckpointError(
                f"tensor {name} in {path} has type {entry['dtype']}; expected one of {', '.join(_STORAGE)}"
            )
        try:
            bits = np.frombuffer(entry["data"], _STORAGE[entry["dtype"]]).reshape(entry["shape"])
        except (ValueError, OverflowError) as error:
            # no data, of a shape that no array can have
            raise CheckpointError(
                f"tensor {name} in {path} has shape {entry['shape']}, which cannot be ({error})"
            ) from error
        tensors[name] = Tensor(entry["dtype"], bits)
    texts: dict[str, str] = header.get("__metadata__") or {}
    if CHECKSUM in texts:
        verify(path, texts.pop(CHECKSUM), tensors, texts)
    return tensors, texts


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file: 8 bytes of header length, the header as JSON, then the raw data.

    ``metadata`` are texts for the header; the checksum is put beside them.
    """
    # wide types first, so that each tensor begins at a multiple of its item size: readers map them in place
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].bits.itemsize))
    texts = metadata or {}
    header: dict[str, Any] = {"__metadata__": texts | {CHECKSUM: checksum(tensors, texts)}}
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
            file.write(np.ascontiguousarray(tensor.bits).reshape(-1).view(np.uint8).data)
