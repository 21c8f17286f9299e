"""Rows come into an arena, or get a slab of their own in it; only what is not there yet is copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core.config import EvictionConfig
from ..core.slabs import Hold
from ..errors import ModelMismatchError, UnsupportedFeatureError
from .arena import Arena
from .row import Row


def new_row(arena: Arena, config: EvictionConfig | None = None) -> Row:
    """An empty sequence on a free slab, which must be there."""
    return Row(arena, config or arena.config, arena.slabs.take())


def own(arena: Arena, rows: Iterable[Row]) -> None:
    """Give each row of the arena a slab of its own before it is written to: a copy where it shares one."""
    sharing = [row for row in rows if arena.slabs.shared(row.hold)]
    if not sharing:
        return
    arena.reserve(len(sharing))
    for row in sharing:
        # the last one that is left keeps the slab
        if arena.slabs.shared(row.hold):
            hold = arena.slabs.take()
            arena.take(hold.index, arena.pool, arena.recent, row.slab, _filled(row))
            row.hold = hold


def admit(arena: Arena, rows: Sequence[Row]) -> list[Row]:
    """Rows of this arena stay as they are; those of another get slabs here, with what they hold.

    Raises:
        ModelMismatchError: they belong to another model or other gates.
        UnsupportedFeatureError: they compete by another rule.
    """
    foreign = [row for row in rows if row.arena is not arena]
    for row in foreign:
        _check(arena, row)
        row.arena.check()
    for other in {id(row.arena): row.arena for row in foreign}.values():
        other.score(wait=True)
        arena.level(other)
    arena.reserve(len({(id(row.arena), row.slab) for row in foreign}))
    placed: dict[tuple[int, int], Hold] = {}
    found = []
    for row in rows:
        key = id(row.arena), row.slab
        if row.arena is arena:
            found.append(row)
        elif key in placed:
            found.append(row.at(arena, arena.slabs.share(placed[key])))
        else:
            placed[key] = arena.slabs.take()
            _copy_in(arena, placed[key].index, row)
            found.append(row.at(arena, placed[key]))
    return found


def alone(row: Row) -> Row:
    """The same sequence in an arena of its own."""
    arena, twin = row.arena, row.arena.like(1, row.config)
    arena.score(wait=True)
    twin.pool = arena.pool.resized([row.slab], 1)
    twin.recent = arena.recent.resized([row.slab], 1)
    made = row.at(twin, twin.slabs.take())
    twin.evaluate()
    return made


def _copy_in(arena: Arena, slab: int, row: Row) -> None:
    pool = row.arena.pool.resized([row.slab], 1)
    if pool.capacity < arena.pool.capacity:
        pool.grow_like(arena.pool)
    arena.take(slab, pool, row.arena.recent.resized([row.slab], 1), 0, _filled(row))


def _filled(row: Row) -> int:
    """Places of its window that hold something."""
    return row.length if row.wide is None else 0


def _check(arena: Arena, row: Row) -> None:
    for name in ("policy", "scope", "kv_bits"):
        ours, theirs = getattr(arena.config, name), getattr(row.config, name)
        if ours != theirs:
            raise UnsupportedFeatureError(
                f"a row of {name} {theirs!r} cannot join those of {ours!r}; keep batches of each"
            )
    if (row.arena.identity, row.arena.shape) != (arena.identity, arena.shape):
        raise ModelMismatchError(
            "the rows belong to another model or other gates; make their cache for this one"
        )
