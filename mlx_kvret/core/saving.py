"""Saved caches written by one rank for all, and read alike by all."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .packed import Packed
from .shares import Share
from .snapshot import Snapshot, read_snapshot, write_snapshot
from .tensors import Tensor
from .types import Array, Ints


def of_all(
    share: Share,
    counts: Ints,
    newest: int,
    position: Ints,
    retention: Array,
    stored: Sequence[Tensor],
    packed: Packed | None,
) -> tuple[Ints, Ints, Array, list[Tensor], Packed | None]:
    """What stands in a snapshot, of the whole, by this rank's; an exchange.

    ``counts`` (heads,) says how many entries each head has. ``stored`` are keys and values of all of them, or
    of the ``newest`` tokens of each head where the others are ``packed``.
    """
    held = counts if packed is None else np.full_like(counts, newest)
    _, bits = share.joined(held, *(tensor.bits for tensor in stored))
    if packed is not None:
        parts = packed.keys, packed.values
        _, words = share.joined(counts - newest, *(tensor.bits for tensor in parts))
        keys, values = (Tensor(old.dtype, new) for old, new in zip(parts, words, strict=True))
        packed = replace(packed, keys=keys, values=values)
    counts, (position, retention) = share.joined(counts, position, retention)
    whole = [Tensor(old.dtype, new) for old, new in zip(stored, bits, strict=True)]
    return counts, position, retention, whole, packed


def write_once(path: str | os.PathLike[str], snapshot: Snapshot, share: Share | None) -> None:
    """Write a snapshot of the whole, on several ranks by the first.

    Raises:
        ConfigError: the file cannot be written.
        RankError: the first rank could not write it.
    """
    if share is None:
        write_snapshot(path, snapshot)
    else:
        share.ranks.agreed(lambda: write_snapshot(path, snapshot) if share.ranks.rank == 0 else None)


def read_alike(path: str | os.PathLike[str], share: Share | None) -> Snapshot:
    """Read a snapshot, which all ranks must find under the same name.

    Raises:
        CheckpointError: as :func:`.snapshot.read_snapshot`.
        RankError: another rank cannot read it, or finds something else.
    """
    if share is None:
        return read_snapshot(path)
    found: list[Snapshot] = []

    def read() -> None:
        found.append(read_snapshot(path))

    share.ranks.agreed(read)
    (snapshot,) = found
    arrays = [
        snapshot.counts,
        snapshot.position,
        snapshot.retention,
        snapshot.keys.bits,
        snapshot.values.bits,
    ]
    if snapshot.packed is not None:
        arrays += [snapshot.packed.keys.bits, snapshot.packed.values.bits]
    mark = snapshot.seen
    for array in arrays:
        mark = zlib.crc32(np.ascontiguousarray(array).data, mark)
    share.ranks.alike(mark, f"{path} is not the same file on all machines; copy the first rank's to them")
    return snapshot
