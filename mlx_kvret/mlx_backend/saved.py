"""Bounded caches in mlx-lm's prompt files: every layer's state, and how loaded layers become a snapshot.

A file is checked as one of :mod:`mlx_kvret.core.snapshot` is, by the same code, before any of it is used: an
index from a file that is out of range would write into foreign memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..core.bits import packings
from ..core.budget import CacheShape
from ..core.config import EvictionConfig
from ..core.eviction import heads_per_group
from ..core.options import whole
from ..core.packed import Packed
from ..core.pictures import from_array, to_array
from ..core.reading import exactly, parse_json
from ..core.snapshot import Snapshot
from ..core.tensors import FLOATS, Tensor, checksum, verify
from ..errors import CheckpointError, ConfigError
from .candidates import retention_of
from .gates import CODES, to_tensor

if TYPE_CHECKING:
    from .bounded import Bounded

FORMAT = "kvret-prompt-cache 1"
_RECENT, _POOL = ("keys", "values", "log_beta"), ("keys", "values", "retention", "position", "owner")
_KEYS = {
    *("format", "layer", "owner", "shape", "eviction", "seen", "counts", "capacity", "checksum"),
    "dtype",  # of packed entries' floats
    "pictures",
}


class Loaded:
    """A layer read from a prompt file; the model joins all of them when it first sees them together."""

    def __init__(self, state: list[Any]) -> None:
        try:
            self.header = parse_json(state[0])
            known = self.header["format"] == FORMAT
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise CheckpointError(
                "the prompt file holds no bounded cache that can be read; save it again"
            ) from error
        if not known:
            raise CheckpointError(
                f"the prompt file has format {self.header['format']!r}; this release reads {FORMAT!r}"
            )
        _require(self.header.keys() <= _KEYS, f"its header has {', '.join(sorted(self.header))}")
        self.arrays = _named(state[1:])
        stored = self.header.pop("checksum", None)
        if stored is not None:
            verify("the prompt file", stored, self.arrays, {"header": _canonical(self.header)})

    @property
    def shape(self) -> CacheShape:
        """What the saved layers cache."""
        found = self.header.get("shape")
        names = [field.name for field in dataclasses.fields(CacheShape)]
        good = isinstance(found, dict) and sorted(found) == sorted(names)
        _require(good and all(type(value) is int for value in found.values()), f"its shape is {found!r}")
        return CacheShape(**found)


def layer_state(shared: Bounded, layer: int) -> list[Any]:
    """Strings and arrays that restore one layer; the first layer's hold the pool."""
    shared.settle()
    row, arena = shared.row, shared.arena
    header = {
        "format": FORMAT,
        "layer": layer,
        "owner": shared.owner,
        "shape": dataclasses.asdict(shared.shape),
        "eviction": row.config.to_dict(),
        "seen": row.seen,
        "counts": row.schedule.counts.tolist(),
        "capacity": arena.pool.capacity,
    }
    if row.pictures:
        # files of text stay as earlier releases read them
        header["pictures"] = to_array(row.pictures).tolist()
    if row.config.kv_bits is not None:
        known = arena.pool.capacity or not row.length
        header["dtype"] = CODES[arena.pool.dtype if known else row.window(0)[0].dtype]
    new: list[Any] = [None, None, None]
    if row.length:
        log_beta = retention_of(row, row.length)[layer] if row.config.policy == "learned" else None
        new = [*row.window(layer), log_beta]
    pool = arena.pool.resized([row.slab], 1).arrays() if layer == 0 else []
    arrays = [*new, *pool]
    return [_Sealed(header, arrays), *arrays]


class _Sealed(str):
    """A header that gets its checksum when it is written out, letter by letter.

    mlx-lm asks for the state after every chunk of a prompt as well, where a checksum would be worked out for
    nothing.
    """

    _parts: tuple[dict[str, Any], list[Any]]

    def __new__(cls, header: dict[str, Any], arrays: list[Any]) -> _Sealed:
        made = super().__new__(cls, json.dumps(header))
        made._parts = header, arrays
        return made

    def __iter__(self) -> Iterator[str]:
        header, arrays = self._parts
        stored = checksum(_named(arrays), {"header": _canonical(header)})
        return iter(json.dumps(header | {"checksum": stored}))


def snapshot_of(layers: list[Any], shape: CacheShape) -> Snapshot:
    """All competing layers of a prompt file, checked; ``shape`` is the model's.

    Raises:
        CheckpointError: they contradict each other, or hold what no cache of this shape can.
    """
    _require(all(isinstance(entry, Loaded) for entry in layers), "some of its layers are of another kind")
    header = layers[0].header
    for index, entry in enumerate(layers):
        same = exactly(entry.header, header | {"layer": index})
        _require(same, f"layer {index} does not belong to the first one")
    try:
        config = EvictionConfig.from_dict(header.get("eviction"))
        whole("seen", header.get("seen"), 0)
        whole("capacity", header.get("capacity"), 0, config.budget + config.buffer)
    except ConfigError as error:
        raise CheckpointError(f"the prompt file is damaged: {error}; save it again") from error
    _require(config.policy != "full", "its policy is 'full', which is mlx-lm's own cache")
    owner = header.get("owner")
    _require(isinstance(owner, dict) and "model" in owner, f"its owner is {owner!r}")
    assert isinstance(owner, dict)

    pool = _pooled(layers[0].arrays, shape, config, header)
    new = [_recent(entry.arrays, index, shape, config, header) for index, entry in enumerate(layers)]
    head, position, retention = (
        np.concatenate([part[name] for part in (pool, *new)]) for name in ("head", "position", "retention")
    )
    order = np.lexsort((position, head))
    packed, held, place = None, [pool, *new], order
    if config.kv_bits is not None:
        packed, held = _packed(pool, new, config, shape), new
        place = np.argsort(np.concatenate([part["head"] for part in new]), kind="stable")
    counts = np.bincount(head, minlength=shape.heads).reshape(shape.layers, shape.kv_heads)
    try:
        pictures = from_array(np.array(header.get("pictures", []), np.int32).reshape(-1, 5), header["seen"])
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"the prompt file is damaged: {error}; save it again") from error
    return Snapshot(
        model=owner["model"],
        gates=owner.get("gates", ""),
        eviction=config,
        seen=header["seen"],
        counts=counts.astype(np.int32),
        position=position[order].astype(np.int32),
        retention=retention[order].astype(np.float32),
        keys=_joined([part["keys"] for part in held], place, shape.key_dim, header.get("dtype")),
        values=_joined([part["values"] for part in held], place, shape.value_dim, header.get("dtype")),
        packed=packed,
        pictures=pictures,
    )


def _packed(
    pool: dict[str, Any], new: list[dict[str, Any]], config: EvictionConfig, shape: CacheShape
) -> Packed:
    """The pool's rows, in the order of their heads and positions."""
    order = np.lexsort((pool["position"], pool["head"]))
    keys, values = (Tensor("U32", pool[name].bits[order]) for name in ("keys", "values"))
    newest = len(new[0]["head"]) // shape.kv_heads
    return Packed.of(keys, values, newest, config.kv_bits, (shape.key_dim, shape.value_dim))


def _pooled(
    arrays: dict[str, Tensor], shape: CacheShape, config: EvictionConfig, header: dict[str, Any]
) -> dict[str, Any]:
    """The pool's entries, group by group."""
    size, capacity = heads_per_group(config, shape.layers, shape.kv_heads), header["capacity"]
    groups = shape.heads // size
    slots = groups * (capacity * size + 1)
    forms, floats = packings(config.kv_bits, shape.key_dim, shape.value_dim), header.get("dtype")
    good = floats in FLOATS if forms is not None else floats is None
    _require(good, f"its kv_bits are {config.kv_bits}, its dtype is {floats!r}")
    widths = {"keys": shape.key_dim, "values": shape.value_dim}
    itemsize = 4 if floats == "F32" else 2
    if forms is not None:
        widths = {name: form.words(itemsize) for name, form in zip(widths, forms, strict=True)}
    widths = widths if capacity else dict.fromkeys(widths, 0)
    entries: tuple[str, ...] = FLOATS if forms is None or not capacity else ("U32",)
    found = {}
    for name in _POOL:
        tensor = arrays.get(f"pool.{name}")
        expected = (slots, widths[name]) if name in widths else (slots,)
        _require(
            tensor is not None and tensor.shape == expected, f"its pool has no {name} of shape {expected}"
        )
        assert tensor is not None
        types = ("I32",) if name in ("position", "owner") else ("F32",) if name == "retention" else entries
        _require(tensor.dtype in types, f"{name} of its pool is {tensor.dtype}, expected {', '.join(types)}")
        found[name] = tensor
    owner = found["owner"].bits.reshape(groups, -1)
    _require(((owner >= 0) & (owner <= shape.heads)).all(), "an entry of its pool belongs to no head")
    used = owner < shape.heads
    own = (owner // size == np.arange(groups)[:, None]) | ~used
    _require(own.all() and not used[:, -1].any(), "an entry of its pool stands in another head's place")
    _require(exactly(header.get("counts"), used.sum(1).tolist()), "its pool holds other numbers of entries")
    flat = used.reshape(-1)
    keys, values = (Tensor(found[name].dtype, found[name].bits[flat]) for name in ("keys", "values"))
    if forms is not None and not capacity:
        keys, values = (Tensor.of(np.zeros((0, form.words(itemsize))), "U32") for form in forms)
    return {
        "head": owner[used],
        "position": found["position"].bits[flat],
        "retention": found["retention"].bits[flat],
        "keys": keys,
        "values": values,
    }


def _recent(
    arrays: dict[str, Tensor], layer: int, shape: CacheShape, config: EvictionConfig, header: dict[str, Any]
) -> dict[str, Any]:
    """A layer's newest tokens, head by head."""
    heads, seen = shape.kv_heads, header["seen"]
    keys, where = arrays.get("keys"), f"layer {layer} of the prompt file"
    tokens = keys.shape[2] if keys is not None and len(keys.shape) == 4 else 0
    _require(tokens <= min(seen, max(1, config.buffer)), f"{where} has {tokens} new tokens")
    expected: dict[str, tuple[int, ...]] = {
        "keys": (1, heads, tokens, shape.key_dim),
        "values": (1, heads, tokens, shape.value_dim),
    }
    if config.policy == "learned":
        expected["log_beta"] = (heads, tokens)
    names = {name for name in arrays if not name.startswith("pool.")}
    _require(names == (expected.keys() if keys is not None else set()), f"{where} has {', '.join(names)}")
    for name in names:
        found, types = arrays[name], ("F32",) if name == "log_beta" else FLOATS
        fits = found.shape == expected[name] and found.dtype in types
        _require(fits, f"{where} has {name} of shape {found.shape} and type {found.dtype}")
    log_beta = arrays["log_beta"].bits if "log_beta" in names else np.zeros((heads, tokens), np.float32)
    return {
        "head": np.repeat(np.arange(layer * heads, (layer + 1) * heads), tokens),
        "position": np.tile(np.arange(seen - tokens, seen), heads),
        # what never changes is worked out from the keys again
        "retention": log_beta.reshape(-1),
        "keys": _rows(arrays.get("keys"), shape.key_dim),
        "values": _rows(arrays.get("values"), shape.value_dim),
    }


def _rows(tensor: Tensor | None, width: int) -> Tensor | None:
    return None if tensor is None else Tensor(tensor.dtype, tensor.bits.reshape(-1, width))


def _joined(parts: list[Tensor | None], order: np.ndarray, width: int, dtype: str | None) -> Tensor:
    """In order; ``dtype`` is the type where packed entries have one."""
    filled = [part for part in parts if part is not None and len(part.bits)]
    types = sorted({part.dtype for part in filled})
    _require(len(types) < 2, f"its keys or values are of types {' and '.join(types)}")
    _require(dtype is None or types in ([], [dtype]), f"its newest entries are {types}, its kept of {dtype}")
    if not filled:
        return Tensor.of(np.zeros((0, width), np.float32), dtype or "F32")
    return Tensor(types[0], np.concatenate([part.bits for part in filled])[order])


def _named(arrays: list[Any]) -> dict[str, Tensor]:
    """The arrays of a layer's state by name, as they are stored."""
    names = [*_RECENT, *(f"pool.{name}" for name in _POOL)]
    whole_number = len(arrays) in (len(_RECENT), len(names))
    _require(whole_number, f"a layer has {len(arrays)} arrays, expected {len(_RECENT)} or {len(names)}")
    found = {}
    for name, array in zip(names, arrays, strict=False):
        if array is None:
            continue
        _require(isinstance(array, mx.array), f"{name} is a {type(array).__name__}, expected an array")
        try:
            found[name] = to_tensor(array)
        except KeyError as error:
            raise CheckpointError(
                f"the prompt file is damaged: {name} is {array.dtype}; save it again"
            ) from error
    return found


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True)


def _require(fits: object, otherwise: str) -> None:
    if not fits:
        raise CheckpointError(f"the prompt file is damaged: {otherwise}; save it again")
