"""Kept entries in fewer bits: what ``kv_bits`` may be, the form they are stored in, and its bytes.

Entries are packed once, when they are kept; the recent window stays in the model's float type. The form is
MLX's affine one, in groups along the head dimension: x ≈ scale · code + bias, so that ``mx.quantize`` and
``mx.dequantize`` say the same. Groups lie within one entry, for an eviction must not break any.

An entry is one row of 32-bit words, the same on every backend: the codes, lowest bits first, then scale and
bias of each group, side by side in the model's float type, low half first where that has 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import ConfigError, UnsupportedFeatureError
from .options import short
from .tensors import Tensor
from .types import Array, Floats

KVBits = Literal[8, "k8v4", 4] | None
CHOICES = ("16", "8", "k8v4", "4")
# keys, values
_BITS: dict[KVBits, tuple[int, int]] = {8: (8, 8), "k8v4": (8, 4), 4: (4, 4)}
_NAMES: dict[object, KVBits] = {
    None: None, 16: None, "16": None, 8: 8, "8": 8, "k8v8": 8, "k8v4": "k8v4", 4: 4, "4": 4, "k4v4": 4
}  # fmt: skip
# elements of a group, the first that divides a head
GROUPS = (64, 32)
_LEAST = np.float32(1e-7)  # of a scale


def parse_bits(value: object) -> KVBits:
    """What ``kv_bits`` means: 8 or 4 bits for keys and values, ``"k8v4"``, or None, the model's float type.

    Raises:
        ConfigError: it is none of these.
    """
    known = value is None or (isinstance(value, (int, str)) and not isinstance(value, bool))
    name = value.strip().lower() if isinstance(value, str) else value
    if not known or name not in _NAMES:
        raise ConfigError(
            f"kv_bits is {short(value)}; expected 8 (keys and values), k8v4 (keys in 8 bits, values in 4), "
            "4, or 16 for the model's own float type"
        )
    return _NAMES[name]


def said_bits(kv_bits: KVBits) -> str:
    """In words: ``"8 (K) and 4 (V)"``."""
    if kv_bits is None:
        return "the model's float type"
    keys, values = _BITS[kv_bits]
    return str(keys) if keys == values else f"{keys} (K) and {values} (V)"


@dataclass(frozen=True)
class Packing:
    """How a key or value of ``width`` elements is stored: ``bits`` each, in groups of ``group``."""

    width: int
    bits: int
    group: int

    @property
    def codes(self) -> int:
        """Words that hold the codes."""
        return self.width * self.bits // 32

    @property
    def groups(self) -> int:
        return self.width // self.group

    def words(self, itemsize: int) -> int:
        """Words of a row; ``itemsize`` bytes have scales and biases each."""
        return self.codes + self.groups * itemsize // 2

    def pack(self, values: Tensor) -> Array:
        """Rows (N, words) uint32 of vectors (N, width), as ``mx.quantize`` rounds them."""
        x = values.float32().reshape(-1, self.groups, self.group)
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        most = np.float32(2**self.bits - 1)
        # the edge that is farther from 0 is met exactly, and so is 0
        below = np.abs(low) > np.abs(high)
        step = np.maximum((high - low) / most, _LEAST)
        step, edge = np.where(below, step, -step), np.where(below, low, high)
        steps = np.rint(edge / step)
        at_zero = steps == 0
        scale = np.where(at_zero, step, edge / np.where(at_zero, 1, steps)).astype(np.float32)
        bias = np.where(at_zero, np.float32(0), edge)
        codes = np.clip(np.rint((x - bias) / scale), 0, most).astype(np.uint32)
        per_word = 32 // self.bits
        shift = np.arange(per_word, dtype=np.uint32) * np.uint32(self.bits)
        words = (codes.reshape(-1, self.codes, per_word) << shift).sum(-1, dtype=np.uint32)
        pairs = Tensor.of(np.concatenate([scale, bias], axis=-1), values.dtype).bits
        return np.concatenate([words, _as_words(pairs)], axis=1)

    def unpack(self, rows: Array, dtype: str) -> Tensor:
        """Vectors (N, width) of float type ``dtype``, that of the scales too, as ``mx.dequantize``'s."""
        codes, scale, bias = self.parts(rows, dtype)
        # each operation rounds to the type
        product = Tensor.of(codes * scale, dtype).float32()
        return Tensor.of((product + bias).reshape(-1, self.width), dtype)

    def parts(self, rows: Array, dtype: str) -> tuple[Floats, Floats, Floats]:
        """Codes (N, groups, group), scales and biases (N, groups, 1), all float32."""
        words = np.ascontiguousarray(rows[:, : self.codes], np.uint32)
        shift = np.arange(32 // self.bits, dtype=np.uint32) * np.uint32(self.bits)
        codes = (words[..., None] >> shift) & np.uint32(2**self.bits - 1)
        pairs = self.scales(rows, dtype).float32()
        shape = (len(rows), self.groups, self.group)
        return codes.reshape(shape).astype(np.float32), pairs[..., :1], pairs[..., 1:]

    def cast(self, rows: Array, dtype: str, to: str) -> Array:
        """The same codes with scales and biases in another float type, infinite where that is too small."""
        if dtype == to:
            return rows
        pairs = self.scales(rows, dtype).cast(to)
        return np.concatenate([rows[:, : self.codes], _as_words(pairs.bits)], axis=1)

    def scales(self, rows: Array, dtype: str) -> Tensor:
        """Scales and biases (N, groups, 2) of float type ``dtype``."""
        stored = np.ascontiguousarray(rows[:, self.codes :], np.uint32)
        bits = stored.view(Tensor.of(np.zeros(0), dtype).bits.dtype)
        return Tensor(dtype, bits.reshape(len(rows), self.groups, 2))


def _as_words(pairs: Array) -> Array:
    """Scales and biases (N, groups, 2) as words (N, n)."""
    return np.ascontiguousarray(pairs).reshape(len(pairs), -1).view(np.uint32)


def packings(kv_bits: KVBits, key_dim: int, value_dim: int) -> tuple[Packing, Packing] | None:
    """How keys and values are stored; None for the model's float type.

    Raises:
        UnsupportedFeatureError: the heads do not divide into groups.
    """
    if kv_bits is None:
        return None
    keys, values = _BITS[kv_bits]
    return _packing(key_dim, keys, kv_bits), _packing(value_dim, values, kv_bits)


def _packing(width: int, bits: int, kv_bits: KVBits) -> Packing:
    group = next((size for size in GROUPS if width % size == 0), None)
    if group is None:
        raise UnsupportedFeatureError(
            f"kv_bits={kv_bits!r} does not work with heads of {width} elements, which do not divide into "
            f"groups of {GROUPS[-1]}; leave kv_bits away and lower the budget instead"
        )
    return Packing(width, bits, group)
