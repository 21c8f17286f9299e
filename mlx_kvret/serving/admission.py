"""How many conversations fit into memory: arithmetic, done before the first one comes."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.budget import CacheShape
from ..core.config import EvictionConfig
from ..errors import ConfigError

# the share of the memory that snapshots take where nobody says
SNAPSHOTS = 4


@dataclass(frozen=True)
class Plan:
    """Where the memory goes.

    Args:
        rows: conversations at once.
        slabs: rooms of one conversation each that their arrays may have, which grow by an eighth.
        row: bytes of each, whatever its length.
        reading: bytes that the chunk of a prompt takes while it is read; one is read at a time.
        snapshots: bytes for caches to go on from, with the one that is being copied.
    """

    rows: int
    slabs: int
    row: int
    reading: int
    snapshots: int

    @property
    def total(self) -> int:
        return self.slabs * self.row + self.reading + self.snapshots

    @property
    def kept(self) -> int:
        """Bytes of snapshots between two steps."""
        return max(self.snapshots - self.row, 0)

    def __str__(self) -> str:
        return (
            f"{self.rows} conversations of {self.row / 1e6:,.1f} MB at once, {self.kept / 1e6:,.1f} MB of "
            f"snapshots, {self.reading / 1e6:,.1f} MB while a prompt is read: at most "
            f"{self.total / 1e6:,.1f} MB of KV memory"
        )


def plan(
    shape: CacheShape,
    config: EvictionConfig,
    chunk: int,
    memory: int,
    most_rows: int,
    snapshots: int | None = None,
) -> Plan:
    """Divide the memory.

    Args:
        chunk: tokens of a prompt read at a time.
        memory: bytes for all caches.
        most_rows: conversations at once, though more may fit.
        snapshots: bytes for snapshots; a quarter of the memory unless given.

    Raises:
        ConfigError: not one conversation fits; with the least that would do.
    """
    row, reading = shape.held_by(config), shape.full_nbytes(chunk)
    kept = memory // SNAPSHOTS if snapshots is None else snapshots
    if snapshots and snapshots < 2 * row:
        raise ConfigError(
            f"prompt_cache is {snapshots:,} bytes, which hold no snapshot of {row:,} beside the one that is "
            f"being copied; give at least {2 * row:,}, or 0B"
        )
    room = (memory - reading - kept) // row
    rows = min(most_rows, room)
    while rows > 0 and _slabs(rows) > room:
        rows -= 1
    if rows < 1:
        least = row + reading + (0 if snapshots is None else snapshots)
        least = least if snapshots is not None else -(-least * SNAPSHOTS // (SNAPSHOTS - 1))
        raise ConfigError(
            f"memory is {memory:,} bytes; one conversation takes {row:,}, a chunk of {chunk:,} tokens "
            f"{reading:,} while it is read, and snapshots {kept:,}: give at least {least:,} bytes, or a "
            "smaller budget or chunk"
        )
    return Plan(int(rows), _slabs(rows), row, reading, kept)


def _slabs(rows: int) -> int:
    return rows + rows // 8
