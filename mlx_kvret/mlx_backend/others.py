"""Layers that do not compete: what a model keeps there, and whether a state from a file is such a one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache

from ..core.snapshot import WindowShape
from ..core.tensors import FLOATS
from ..errors import CheckpointError
from .gates import to_tensor
from .kinds import kind as kind_of

Shapes = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Other:
    """An entry of mlx-lm's own, as the model makes it.

    ``shapes`` are those of its arrays after a forward pass, with 0 for the number of tokens and None where it
    keeps no array; ``sizes`` are the numbers it is made with, by name.
    """

    kind: type[Any]
    shapes: Shapes
    sizes: dict[str, int]

    @classmethod
    def of(cls, entry: Any) -> Other:
        """From an entry that has been through a forward pass, which need not have been computed."""
        kind = mlx_cache.KVCache if isinstance(entry, mlx_cache.KVCache) else type(entry)
        return cls(kind, _shapes(kind, _arrays(entry)), _sizes(entry))

    @property
    def window(self) -> WindowShape:
        """Of an entry with keys and values."""
        keys, values = self.shapes
        assert keys is not None and values is not None
        return WindowShape(keys[1], keys[3], values[3])

    def check(self, entry: Any, seen: int, layer: int) -> None:
        """Refuse a loaded entry that the model cannot go on with after ``seen`` tokens.

        Raises:
            CheckpointError: says what is wrong with the layer.
        """
        try:
            wrong = self._wrong(entry, seen)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            # the file decided on the types of all that is in it
            wrong = f"cannot be read ({error})"
        if wrong:
            raise CheckpointError(f"the prompt file is damaged: layer {layer} {wrong}; save it again")

    def _wrong(self, entry: Any, seen: int) -> str | None:
        kind: type[Any] = type(entry)
        if kind is not self.kind:
            return f"is a {type(entry).__name__}, the model keeps a {self.kind.__name__}"
        if (sizes := _sizes(entry)) != self.sizes:
            return f"was made with {sizes}, the model's with {self.sizes}"
        arrays = _arrays(entry)
        shapes, filled = _shapes(self.kind, arrays), [array for array in arrays if array is not None]
        if shapes != (self.shapes if seen else (None,) * len(self.shapes)):
            return f"has arrays of shapes {shapes}, the model's are {self.shapes}"
        stored = [to_tensor(array) for array in filled]
        if not all(tensor.dtype in FLOATS and tensor.finite for tensor in stored):
            return "holds NaN, infinity or no numbers"
        if kind_of(self.kind) in _KEYED:
            offset, tokens = entry.offset, filled[0].shape[2] if filled else 0
            if type(offset) is not int or offset != (seen if filled else 0):
                return f"has seen {offset} tokens, the others {seen}"
            if filled and filled[1].shape[2] != tokens:
                return f"has keys of {tokens} tokens and values of {filled[1].shape[2]}"
            if not _KEYED[kind_of(self.kind)](entry, offset, tokens):
                return f"has an index that does not fit its {tokens} tokens"
        return None


def _kept(entry: Any, offset: int, tokens: int) -> bool:
    return offset <= tokens


def _rotated(entry: Any, offset: int, tokens: int) -> bool:
    index, size = entry._idx, entry.max_size
    if type(index) is not int:
        return False
    if offset <= tokens:
        # not full yet, or just filled by a chunk
        return index == offset
    # a ring, or what a chunk has left behind it
    return tokens >= size and (index == tokens or (tokens == size and entry.keep <= index < size))


def _chunked(entry: Any, offset: int, tokens: int) -> bool:
    start = entry.start_position
    return type(start) is int and 0 <= start <= offset <= start + tokens


_KEYED: dict[str, Callable[[Any, int, int], bool]] = {
    "KVCache": _kept,
    "RotatingKVCache": _rotated,
    "ChunkedKVCache": _chunked,
}


def _is_a(entry: Any, name: str) -> bool:
    return any(kind_of(cls) == name for cls in type(entry).__mro__)


def _sizes(entry: Any) -> dict[str, int]:
    found = {
        name: getattr(entry, name) for name in ("max_size", "keep", "chunk_size") if hasattr(entry, name)
    }
    if any(type(size) is not int for size in found.values()):
        raise TypeError(f"its sizes are {found}")
    return found


def _arrays(entry: Any) -> list[mx.array | None]:
    """The arrays of an entry; one of a model's own kind has none that we know."""
    found: list[Any] = []
    if _is_a(entry, "ArraysCache"):
        if entry.left_padding is not None or entry.lengths is not None:
            raise ValueError("it is one of a batch")
        found = list(entry.cache)
    elif any(_is_a(entry, name) for name in _KEYED):
        found = [entry.keys, entry.values]
    if not all(array is None or isinstance(array, mx.array) for array in found):
        raise TypeError("it holds something other than arrays")
    return found


def _shapes(kind: type, arrays: list[mx.array | None]) -> Shapes:
    shapes = [None if array is None else tuple(array.shape) for array in arrays]
    if kind_of(kind) in _KEYED:
        shapes = [None if shape is None else (*shape[:2], 0, *shape[3:]) for shape in shapes]
    return tuple(shapes)
