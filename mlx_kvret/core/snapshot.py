"""A saved cache that every backend opens: a document read on a server goes on on a laptop.

One safetensors file holds N *entries* (one token in one KV head of one layer) in the order of their flat
heads layer·H + h, those of a head by position. Layers are counted among the L that compete. Kept and recent
entries stand side by side: how a backend lays out its memory is its own affair.

====================  =======  ==========================================================================
``counts``            (L, H)   I32, entries of each head; N is their sum
``position``          (N,)     I32, true 0-based position in the stream
``retention``         (N,)     F32, log β, or a baseline's score where it never changes, else 0
``keys``              (N, Dk)  F32, F16 or BF16, as cached (after RoPE)
``values``            (N, Dv)  the same
``pictures``          (P, 5)   I32, where pictures were read: start and end of each among the tokens, rows and
                               columns of its patches (or 0), and the rotary positions it takes
``extra.{i}.{name}``  any      state of the model's i-th layer where it does not compete (sliding window …)
====================  =======  ==========================================================================

With ``kv_bits`` only the entries of the newest ``window`` tokens, which every head holds, have their keys and
values there. The other P are in two tensors more, in the same order: ``packed_keys`` and ``packed_values``
(P, words) U32, rows of words as of :mod:`~.bits`, with scales in the type of ``keys``.

The header's ``__metadata__`` holds texts: ``format`` and ``version``; ``model``, the base model's
fingerprint; ``gates``, a name for their content (:func:`~.tensors.tensors_id`) or nothing; ``seen``, the
number of tokens; ``eviction``, an :class:`EvictionConfig` as JSON; ``packing``, where entries are packed, a
JSON object of ``window`` and of ``keys`` and ``values`` with ``bits`` and ``group`` each; ``notes``, a JSON
object of texts (chat messages, say); ``checksum``, over all of it (:func:`~.tensors.checksum`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..errors import CheckpointError, ModelMismatchError
from .budget import CacheShape
from .config import EvictionConfig
from .eviction import heads_per_group
from .files import whole_file
from .fingerprint import differences
from .packed import NAMES, Packed, read_packed
from .pictures import Pictures, from_array, next_position, to_array
from .reading import SURROGATE, parse_json
from .tensors import FLOATS, Tensor, read_file, write_tensors
from .types import Floats, Ints

FORMAT, VERSION = "kvret-snapshot", "1"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_ARRAYS = {"counts", "position", "retention", "keys", "values", "pictures"}


@dataclass(frozen=True)
class WindowShape:
    """What a model caches of one token in a layer with a sliding window."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The content of the file, checked on the way in and out.

    ``pictures`` stand among the tokens seen, first to last; :attr:`next_position` follows from them.
    ``extras`` maps a layer's index in the model to its tensors by name; what they mean is up to the backends.
    Where kept entries are ``packed``, ``keys`` and ``values`` are those of the recent window only. A snapshot
    is taken between forward passes, when no compaction is due any more.

    Raises:
        CheckpointError: the parts contradict each other.
    """

    model: str
    gates: str
    eviction: EvictionConfig
    seen: int
    counts: Ints
    position: Ints
    retention: Floats
    keys: Tensor
    values: Tensor
    extras: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    pictures: Pictures = ()
    packed: Packed | None = None

    def __post_init__(self) -> None:
        from_array(to_array(self.pictures), self.seen)
        self._check_arrays()
        self._check_entries()
        for name, text in {"model": self.model, "gates": self.gates, **self.notes}.items():
            _require(isinstance(text, str), f"{name} is {text!r}, expected a text")
            _require(not SURROGATE.search(name + text), f"{name} holds half a character (a lone surrogate)")
        named = all(layer >= 0 and name for layer, state in self.extras.items() for name in state)
        _require(named, "a layer's own tensor has no name or no layer")

    def _check_arrays(self) -> None:
        for name, dtype in (("counts", np.int32), ("position", np.int32), ("retention", np.float32)):
            found = getattr(self, name).dtype
            _require(found == dtype, f"{name} is {found}, expected {np.dtype(dtype)}")
        shape, entries = self.counts.shape, int(self.counts.sum(dtype=np.int64))
        _require(len(shape) == 2 and self.counts.size > 0, f"counts has shape {shape}, expected (L, H)")
        _require(self.counts.min() >= 0, f"a head has {self.counts.min()} entries, expected none or more")
        recent = entries if self.packed is None else self.counts.size * self.packed.newest
        for name, dimensions in (("position", 1), ("retention", 1), ("keys", 2), ("values", 2)):
            shape, expected = getattr(self, name).shape, entries if dimensions == 1 else recent
            fits = len(shape) == dimensions and shape[0] == expected
            _require(fits, f"{name} has shape {shape}, the counts add up to {expected}")
        extras = {
            f"{name} of layer {layer}": tensor
            for layer, state in self.extras.items()
            for name, tensor in state.items()
        }
        for name, tensor in {"keys": self.keys, "values": self.values}.items():
            _require(tensor.dtype in FLOATS, f"{name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}")
        for name, tensor in {"keys": self.keys, "values": self.values, **extras}.items():
            _require(tensor.finite, f"{name} holds NaN or infinity")
        _require(np.isfinite(self.retention).all(), "retention holds NaN or infinity")
        bits = self.eviction.kv_bits
        _require((bits is None) == (self.packed is None), f"kv_bits is {bits}, its entries are not")
        if self.packed is not None:
            _require(self.keys.dtype == self.values.dtype, "keys and values are of two types")
            self.packed.check(entries - recent, self.keys.dtype)

    def _check_entries(self) -> None:
        _require(0 <= self.seen < 2**31, f"seen is {self.seen}, expected 0 to 2^31 - 1 tokens")
        inside = (self.position >= 0) & (self.position < self.seen)
        _require(inside.all(), f"there are positions outside of the {self.seen} tokens seen")
        place = self.head.astype(np.int64) * 2**32 + self.position
        _require((np.diff(place) > 0).all(), "the positions of a head do not rise")
        if self.packed is not None:
            newest, limit = self.packed.newest, max(1, self.eviction.buffer)
            _require(newest <= limit, f"its window has {newest} tokens, its buffer {limit}")
            _require(self._newest(newest) == newest, "not every head holds the whole window")
        if self.eviction.policy == "learned":
            _require(not (self.retention > 0).any(), "log β is above 0 for some entries")
            _require(self.gates != "", "the policy is 'learned' and its gates are not named")
        if self.eviction.policy != "full":
            size = heads_per_group(self.eviction, *self.counts.shape)
            held = self.counts.reshape(-1, size).sum(1).max()
            most = (self.eviction.budget + self.eviction.buffer) * size
            _require(held <= most, f"{size} heads hold {held} entries, budget and buffer allow {most}")

    @property
    def head(self) -> Ints:
        """Flat head of each entry, (N,) int32."""
        return np.repeat(np.arange(self.counts.size, dtype=np.int32), self.counts.ravel())

    @property
    def next_position(self) -> int:
        """The rotary position of the token that comes next."""
        return next_position(self.pictures, self.seen)

    def recent(self, limit: int) -> int:
        """How many of the newest tokens every head holds, up to ``limit``: they are its recent window."""
        return self._newest(limit) if self.packed is None else self.packed.newest

    def _newest(self, limit: int) -> int:
        # no head holds more than it has entries, however large a buffer the file tells of
        limit = min(limit, int(self.counts.min()))
        age = self.seen - 1 - self.position
        held = np.bincount(age[age < limit], minlength=limit + 1) == self.counts.size
        return int(held.argmin())

    def cast(self, dtype: str) -> Snapshot:
        """The same entries in the float type that a model computes in, ``F32``, ``F16`` or ``BF16``.

        Raises:
            ModelMismatchError: that type cannot hold them.
        """
        try:
            with np.errstate(over="ignore"):
                return replace(
                    self,
                    keys=self.keys.cast(dtype),
                    values=self.values.cast(dtype),
                    packed=self.packed and self.packed.cast(self.keys.dtype, dtype),
                    extras={
                        at: {name: tensor.cast(dtype) for name, tensor in own.items()}
                        for at, own in self.extras.items()
                    },
                )
        except CheckpointError as error:
            raise ModelMismatchError(
                f"the cache was saved in {self.keys.dtype} with values that are too large for the model's "
                f"{dtype}; load the model in the type it was saved with"
            ) from error

    def check(self, model: str, gates: str, eviction: EvictionConfig) -> None:
        """Refuse to go on with another model (fingerprint), other gates (their id) or other options.

        Raises:
            ModelMismatchError: names everything that differs.
        """
        wrong = differences(model, self.model)
        if self.eviction.policy == "learned" and gates != self.gates:
            wrong.append(f"the gates are {gates or 'missing'}, expected {self.gates}")
        for name in (part.name for part in fields(EvictionConfig)):
            if (found := getattr(eviction, name)) != (expected := getattr(self.eviction, name)):
                wrong.append(f"{name} is {found}, expected {expected}")
        if wrong:
            raise ModelMismatchError(
                f"the saved cache cannot go on here: {'; '.join(wrong)}; give the model, gates and options "
                "it was saved with, or read the prompt again"
            )

    def check_shape(self, shape: CacheShape, others: Iterable[int]) -> None:
        """Refuse a model with other bounded layers, or with ``others`` that were not saved.

        Raises:
            CheckpointError: says which.
        """
        if self.eviction.policy == "full":
            raise CheckpointError(
                "the saved cache has the policy 'full', which keeps a backend's own cache; save it there"
            )
        found = (*self.counts.shape, self.keys.shape[1], self.values.shape[1])
        expected = (shape.layers, shape.kv_heads, shape.key_dim, shape.value_dim)
        if found != expected:
            raise CheckpointError(
                f"the saved cache has (layers, KV heads, key dim, value dim) {found}, the model {expected}; "
                "load the model it was saved with"
            )
        others = set(others)
        # an empty window has no tensors
        if self.seen and (missing := sorted(others - set(self.extras))):
            raise CheckpointError(
                f"the saved cache lacks layer {missing[0]}, which is not bounded; save it again"
            )
        if unknown := sorted(set(self.extras) - others):
            raise CheckpointError(
                f"the saved cache holds a state for layer {unknown[0]}, which has none of its own in the "
                "model; load the model it was saved with"
            )

    def window(self, layer: int, size: int, shape: WindowShape) -> dict[str, Tensor]:
        """Keys (H, n, Dk) and values (H, n, Dv) of a layer with a sliding window, oldest first, or nothing.

        Args:
            size: tokens in the window; all of it that was seen must be there.
            shape: KV heads and widths in the model.

        Raises:
            CheckpointError: says what is wrong with the layer.
        """
        state, where = self.extras.get(layer, {}), f"the saved cache cannot go on: layer {layer}"
        if not self.seen:
            _require(not state, f"{where} has a state, but no token was seen; save it again")
            return {}
        _require(
            state.keys() == {"keys", "values"},
            f"{where} holds {', '.join(sorted(state)) or 'nothing'}, expected the keys and values of a "
            "sliding window; save it again",
        )
        tokens = state["keys"].shape[1] if len(state["keys"].shape) == 3 else 0
        least = min(self.seen, size)
        for name, width in (("keys", shape.key_dim), ("values", shape.value_dim)):
            found, dtype = state[name].shape, state[name].dtype
            _require(
                found == (shape.kv_heads, tokens, width) and least <= tokens <= self.seen,
                f"{where} has {name} of shape {found}, expected ({shape.kv_heads}, {least} to {self.seen}, "
                f"{width}); load the model it was saved with",
            )
            _require(dtype in FLOATS, f"{where} has {name} of type {dtype}, expected {', '.join(FLOATS)}")
        return state


def write_snapshot(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Write a snapshot, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    tensors = {
        "counts": Tensor.of(snapshot.counts, "I32"),
        "position": Tensor.of(snapshot.position, "I32"),
        "retention": Tensor.of(snapshot.retention, "F32"),
        "keys": snapshot.keys,
        "values": snapshot.values,
    }
    if snapshot.pictures:
        tensors["pictures"] = Tensor.of(to_array(snapshot.pictures), "I32")
    if snapshot.packed is not None:
        tensors |= snapshot.packed.tensors
    for layer, state in snapshot.extras.items():
        tensors |= {f"extra.{layer}.{name}": tensor for name, tensor in state.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": snapshot.model,
        "gates": snapshot.gates,
        "seen": str(snapshot.seen),
        "eviction": json.dumps(snapshot.eviction.to_dict()),
        "notes": json.dumps(snapshot.notes),
    }
    if snapshot.packed is not None:
        metadata["packing"] = snapshot.packed.header
    # a cache holds what people said
    with whole_file(path, private=True) as scratch:
        write_tensors(scratch, tensors, metadata)


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Read and validate a snapshot.

    Raises:
        CheckpointError: not a snapshot, damaged, truncated, or of another version.
    """
    tensors, metadata = read_file(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no saved cache: its format is {metadata.get('format')!r}, expected {FORMAT!r}; "
            "give a file that this program saved"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {metadata.get('version')!r}; this release reads version {VERSION!r}; "
            "update mlx-kvret or read the prompt again"
        )
    try:
        return _assemble(tensors, metadata)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}; copy it or save it again") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it or save it again") from error


def _assemble(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Snapshot:
    extras: dict[int, dict[str, Tensor]] = {}
    for name in tensors.keys() - _ARRAYS - set(NAMES):
        kind, layer, own_name = (*name.split(".", 2), "", "")[:3]
        known = kind == "extra" and _NUMBER.fullmatch(layer) and own_name
        _require(known, f"there is an unknown tensor {name}")
        extras.setdefault(int(layer), {})[own_name] = tensors[name]
    seen = metadata["seen"]
    _require(_NUMBER.fullmatch(seen), f"seen is {seen!r}, expected a number of tokens")
    eviction = EvictionConfig.from_dict(_object(metadata["eviction"]))
    key_dim, value_dim = ((0, *tensors[name].shape)[-1] for name in ("keys", "values"))
    return Snapshot(
        model=metadata["model"],
        gates=metadata["gates"],
        eviction=eviction,
        seen=int(seen),
        counts=tensors["counts"].bits,
        position=tensors["position"].bits,
        retention=tensors["retention"].bits,
        keys=tensors["keys"],
        values=tensors["values"],
        extras=extras,
        notes=_object(metadata["notes"]),
        pictures=from_array(tensors["pictures"].bits, int(seen)) if "pictures" in tensors else (),
        packed=read_packed(tensors, metadata.get("packing"), eviction.kv_bits, (key_dim, value_dim)),
    )


def _object(text: str) -> dict[str, Any]:
    data = parse_json(text)
    _require(isinstance(data, dict), f"its header holds {text:.80}, expected a JSON object")
    return data


def _require(fits: object, otherwise: str) -> None:
    if not fits:
        raise CheckpointError(otherwise)
