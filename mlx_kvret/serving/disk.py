"""Snapshots that outlive the process: files in one folder, written and read beside decoding."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..core.files import sweep
from ..core.snapshot import Snapshot, read_snapshot, write_snapshot
from ..errors import ConfigError, KVRetError
from .prefixes import PENDING, Key

log = logging.getLogger(__name__)
_NAME = re.compile(r"(?P<length>[1-9][0-9]{0,9})-(?P<digest>[0-9a-f]{64})\.kvret", re.ASCII)


class Disk:
    """A :class:`.prefixes.Beside`: whole files, for their owner only, named by hashes.

    What a cache holds is copied to the host by the caller's thread; a thread of this object's own writes and
    reads. At most ``waiting`` snapshots wait to be written: what comes faster than the disk takes it is
    dropped.

    Args:
        limit: bytes that the folder may take; the files that were used longest ago go first.
        take, reopen: from a cache to what it holds, and back.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        take: Callable[[Any], Snapshot],
        reopen: Callable[[Snapshot], Any],
        waiting: int = 4,
    ) -> None:
        self._folder, self._limit, self._take, self._reopen = folder, limit, take, reopen
        self._lock, self._room = threading.Lock(), threading.Semaphore(waiting)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep(folder)
            self._sizes = dict(self._found())
            writable = os.access(folder, os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigError(
                f"cannot keep snapshots in {folder}: {error.strerror}; choose another folder"
            ) from error
        if not writable:
            raise ConfigError(f"cannot write into {folder}; choose another folder for snapshots")
        self._reads: dict[Key, Future[Snapshot]] = {}
        self._threads = ThreadPoolExecutor(1, "kvret-disk")
        self._make_room()

    def _found(self) -> list[tuple[Key, int]]:
        """Files that are there, the longest unused first."""
        files = []
        for entry in os.scandir(self._folder):
            if (name := _NAME.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                told = entry.stat(follow_symlinks=False)
                files.append((told.st_mtime_ns, Key(int(name["length"]), name["digest"]), told.st_size))
        return [(key, size) for _, key, size in sorted(files, key=lambda file: file[0])]

    def _path(self, key: Key) -> Path:
        return self._folder / f"{key.length}-{key.digest}.kvret"

    def lengths(self) -> list[int]:
        with self._lock:
            return sorted({key.length for key in self._sizes})

    def __contains__(self, key: Key) -> bool:
        with self._lock:
            return key in self._sizes

    def put(self, key: Key, cache: Any, wait: bool = False) -> None:
        """Write what a cache holds, later; ``wait`` for room instead of dropping it."""
        if key in self or not self._room.acquire(blocking=wait):
            return
        try:
            self._threads.submit(self._write, key, self._take(cache))
        except BaseException:
            self._room.release()
            raise

    def _write(self, key: Key, snapshot: Snapshot) -> None:
        try:
            path = self._path(key)
            write_snapshot(path, snapshot)
            with self._lock:
                self._sizes[key] = path.stat().st_size
            self._make_room()
        except (KVRetError, OSError) as error:
            log.warning("a snapshot was not written: %s", error)
        finally:
            self._room.release()

    def _make_room(self) -> None:
        with self._lock:
            while self._sizes and sum(self._sizes.values()) > self._limit:
                self._remove(next(iter(self._sizes)))

    def _remove(self, key: Key) -> None:
        del self._sizes[key]
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def get(self, key: Key) -> Any:
        """The cache of a file; PENDING until it has been read; None if it is gone, damaged or another's."""
        read = self._reads.get(key)
        if read is None:
            # of requests that have left meanwhile
            self._reads = {other: found for other, found in self._reads.items() if not found.done()}
            read = self._reads[key] = self._threads.submit(read_snapshot, self._path(key))
        if not read.done():
            return PENDING
        del self._reads[key]
        try:
            snapshot = read.result()
            if snapshot.seen != key.length:
                raise ConfigError(f"it has seen {snapshot.seen} tokens")
            cache = self._reopen(snapshot)
        except (KVRetError, OSError) as error:
            log.warning("a snapshot cannot be used and is removed: %s", error)
            with self._lock:
                if key in self._sizes:
                    self._remove(key)
            return None
        with self._lock, contextlib.suppress(OSError):
            # used last
            self._sizes[key] = self._sizes.pop(key, 0)
            os.utime(self._path(key))
        return cache

    def close(self) -> None:
        """Wait until everything is written."""
        self._threads.shutdown(wait=True)
