"""From a loaded model to a service that is ready."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.options import whole
from ..core.picture_prompts import unseeing
from ..errors import ConfigError
from .admission import Plan, plan
from .app import Service
from .backend import Backend, backend_for
from .batched import Batched
from .disk import Disk
from .engine import Engine, OneByOne
from .leading import Leader, follow
from .metrics import Metrics
from .prefixes import Prefixes
from .prompts import Prompter
from .scheduler import Scheduler
from .settings import Settings
from .worker import Worker


@dataclass(frozen=True)
class Room:
    """Memory and disk.

    Args:
        memory: bytes for all caches; half of what is free unless given.
        rows: conversations at once, though more may fit.
        chunk: tokens of a prompt read at a time.
        snapshots: bytes of the memory for caches to go on from; a quarter unless given.
        folder: where snapshots go that memory has no room for, and at the end all of them.
        disk: bytes that the folder may take.
    """

    memory: int | None = None
    rows: int = 16
    chunk: int = 2048
    snapshots: int | None = None
    folder: Path | None = None
    disk: int = 20 * 10**9

    def __post_init__(self) -> None:
        whole("rows", self.rows, 1)
        whole("chunk", self.chunk, 1)


def start(
    model: Any, tokenizer: Any, options: dict[str, Any], settings: Settings, room: Room
) -> tuple[Service, Plan]:
    """A service whose thread waits for requests.

    Args:
        options: of every cache, as of :func:`mlx_kvret.make_cache`.

    Raises:
        ConfigError: the model cannot be served, or not in this memory.
    """
    backend, planned = _planned(model, tokenizer, options, room)
    worker = Worker(lambda: _scheduler(backend, planned, settings, room), planned.rows, settings.queue)
    prompter = Prompter(tokenizer, backend, owner_of(backend), settings.max_prompt, room.chunk)
    # the thread's own: a tokenizer changes while it encodes
    reader = copy.deepcopy(unseeing(tokenizer))
    scheduler = worker.start()
    return Service(settings, backend, prompter, tokenizer, reader, worker, scheduler), planned


def serve_along(model: Any, tokenizer: Any, options: dict[str, Any], room: Room) -> None:
    """What a rank does that is not the first one, given the same as :func:`start`, until that ends.

    Raises:
        ConfigError: as of :func:`start`.
        RankLost: another rank is gone.
    """
    backend, planned = _planned(model, tokenizer, options, room)
    follow(backend, planned.rows)


def _planned(model: Any, tokenizer: Any, options: dict[str, Any], room: Room) -> tuple[Backend, Plan]:
    """What is done in the same way on every rank."""
    if tokenizer is None:
        raise ConfigError("the model's folder has no tokenizer; add one")
    if options.get("policy") == "full":
        raise ConfigError("policy full bounds nothing, so that no memory is ever enough; choose another one")
    backend = backend_for(model, tokenizer, options)
    share = backend.split
    if share is not None and room.folder is not None:
        raise ConfigError(
            "--prompt-cache-dir works in one process; of a model that several hold, snapshots stay in memory"
        )
    free = None if room.memory is not None else _free(backend)
    memory, kept = room.memory if free is None else free // 2, room.snapshots
    assert memory is not None
    if share is not None:
        memory, kept = share.of_all(memory, backend.eviction), kept and share.of_all(kept, backend.eviction)
    try:
        return backend, plan(backend.shape, backend.eviction, room.chunk, memory, room.rows, kept)
    except ConfigError as error:
        if share is None:
            raise
        raise ConfigError(
            f"{error} (bytes of all {share.ranks.size} processes; --memory and --prompt-cache are each one's)"
        ) from error


def _free(backend: Backend) -> int:
    """Bytes that are free, on several ranks on each of them."""
    found = backend.free_bytes()

    def check() -> None:
        if found is None:
            raise ConfigError("how much memory is free cannot be told here; give --memory")

    if backend.ranks is None:
        check()
    else:
        backend.ranks.agreed(check)
    return found or 0


def owner_of(backend: Backend) -> tuple[str, str]:
    """What must agree for a snapshot to be used: model, gates and eviction options."""
    return backend.identity, json.dumps(backend.eviction.to_dict(), sort_keys=True)


def _scheduler(backend: Backend, planned: Plan, settings: Settings, room: Room) -> Scheduler:
    disk = None
    if room.folder is not None:
        # a model whose caches no file can hold is told now
        backend.take(backend.new_cache(None))
        disk = Disk(room.folder, room.disk, backend.take, backend.reopen)
    if backend.ranks is not None:
        leader = Leader(backend, planned.rows)
        prefixes = Prefixes(planned.kept, leader.copy)
        return Scheduler(
            leader, leader, prefixes, Metrics(), planned.rows, room.chunk, settings.timeout, leader.beat
        )
    prefixes = Prefixes(planned.kept, backend.copy, disk, backend)
    engine: Engine = Batched(backend, planned.rows) if backend.batches else OneByOne(backend)
    return Scheduler(backend, engine, prefixes, Metrics(), planned.rows, room.chunk, settings.timeout)
