"""Snapshots in a folder: found again after the process, whole or not at all, never in decoding's way."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from mlx_kvret.core.snapshot import read_snapshot
from mlx_kvret.errors import ConfigError
from mlx_kvret.serving import disk
from mlx_kvret.serving.backend import backend_for
from mlx_kvret.serving.disk import Disk
from mlx_kvret.serving.engine import OneByOne
from mlx_kvret.serving.prefixes import PENDING, Key, Prefix

from .running import OPTIONS, Asking, answer
from .test_scheduler import alone, ids, same


@pytest.fixture(scope="module")
def backend(loaded):
    return backend_for(*loaded, OPTIONS)


def opened(folder, backend, limit=10**9, **options):
    return Disk(folder, limit, backend.take, backend.reopen, **options)


def cache_of(backend, given):
    cache = backend.new_cache(None)
    backend.read(cache, given)
    return cache


def got(store, key):
    end = time.monotonic() + 20
    while (found := store.get(key)) is PENDING:
        assert time.monotonic() < end
        time.sleep(0.001)
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_goes_is_found_by_the_next_process(backend, tmp_path):
    given = ids(100)
    key = Prefix(("a",), given).key(64)
    store = opened(tmp_path / "new", backend)
    store.put(key, cache_of(backend, given[:64]))
    store.close()
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == f"64-{key.digest}.kvret" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    again = opened(tmp_path / "new", backend)
    assert key in again and again.lengths() == [64]
    found = got(again, key)
    assert found.seen == 64
    kept = cache_of(backend, given[:64]).kept_positions()
    for layers in zip(found.kept_positions(), kept, strict=True):
        assert all((one == other).all() for one, other in zip(*layers, strict=True))
    again.close()


def test_jobs_go_on_from_the_disk_as_from_memory(backend, tmp_path):
    start = ids(96)
    with_disk = Asking(backend, OneByOne(backend), beside=opened(tmp_path, backend))
    with_disk.answer(start, marks={64})
    with_disk.scheduler.close()
    later = Asking(backend, OneByOne(backend), beside=opened(tmp_path, backend))
    for length in (5, 50):
        asked = start[:64] + ids(length, 2)
        job = later.job(asked, marks=())
        later.run()
        expected = alone(backend, asked, marks=())
        assert job.cached == 64
        # entries stand in another order, so that sums are rounded otherwise
        same(answer(job), expected)
    # the second time from memory
    assert len(later.scheduler.prefixes) >= 1
    later.scheduler.close()


def test_others_decode_while_one_waits_for_the_disk(backend, tmp_path, monkeypatch):
    start = ids(96)
    first = Asking(backend, OneByOne(backend), beside=opened(tmp_path, backend))
    first.answer(start, marks={64})
    first.scheduler.close()
    let = threading.Event()
    monkeypatch.setattr(disk, "read_snapshot", lambda path: let.wait(20) and read_snapshot(path))
    asking = Asking(backend, OneByOne(backend), beside=opened(tmp_path, backend))
    slow, other = asking.job(start[:64] + ids(5, 2), marks=()), asking.job(ids(40, 3), max_tokens=8)
    while not other.over:
        asking.scheduler.turn()
    assert not slow.told
    assert not asking.scheduler.turn()
    let.set()
    asking.run()
    assert slow.cached == 64 and answer(other) == alone(backend, ids(40, 3), max_tokens=8)
    asking.scheduler.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "another's", "text"])
def test_a_file_that_is_no_use_is_a_miss(backend, tmp_path, damage):
    start = ids(96)
    first = Asking(backend, OneByOne(backend), beside=opened(tmp_path, backend))
    first.answer(start, marks={32, 64})
    first.scheduler.close()
    (path,) = tmp_path.glob("64-*")
    (shorter,) = tmp_path.glob("32-*")
    later = Asking(backend, OneByOne(backend), beside=opened(tmp_path, backend))
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        others = {"cut": data[:-20], "flipped": flipped, "another's": shorter.read_bytes(), "text": b"hello"}
        path.write_bytes(others[damage])
    job = later.job(start[:64] + ids(5, 2), marks=())
    later.run()
    assert job.cached == 32 and answer(job)
    later.scheduler.close()
    assert not path.exists()


def test_the_folder_stays_within_its_limit(backend, tmp_path):
    given = ids(200)
    prefix = Prefix((), given)
    store = opened(tmp_path, backend, waiting=10)
    for length in range(10, 60, 10):
        store.put(prefix.key(length), cache_of(backend, given[:length]), wait=True)
    store.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(sizes) == 5
    again = opened(tmp_path, backend)
    got(again, prefix.key(10))
    again.close()
    # what was used last stays
    limit = max(sizes.values()) * 2
    smaller = opened(tmp_path, backend, limit)
    assert prefix.key(10) in smaller and prefix.key(20) not in smaller
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    smaller.close()


def test_what_comes_faster_than_the_disk_is_dropped(backend, tmp_path, monkeypatch):
    let = threading.Event()
    stock = disk.write_snapshot
    monkeypatch.setattr(disk, "write_snapshot", lambda *given: let.wait(20) and stock(*given))
    given = ids(60)
    store, cache = opened(tmp_path, backend, waiting=2), cache_of(backend, given)
    begun = time.monotonic()
    for length in range(1, 10):
        store.put(Key(length, "a" * 64), cache)
    assert time.monotonic() - begun < 5
    let.set()
    store.close()
    assert len(names(tmp_path)) == 2


def test_other_files_are_left_alone(backend, tmp_path):
    for name in ("notes.txt", "5-abc.kvret", "0-" + "a" * 64 + ".kvret", "5-" + "A" * 64 + ".kvret"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ("7-" + "b" * 64 + ".kvret")).mkdir()
    store = opened(tmp_path, backend, limit=1)
    assert store.lengths() == []
    store.close()
    assert len(names(tmp_path)) == 5


def test_a_folder_that_cannot_be_is_told(backend, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="choose another folder"):
        opened(tmp_path / "file" / "below", backend)


KILLED = """
import sys
import numpy as np
from pathlib import Path
import mlx_kvret
from mlx_kvret.serving.backend import backend_for
from mlx_kvret.serving.disk import Disk
from mlx_kvret.serving.prefixes import Key
backend = backend_for(*mlx_kvret.load("demo", backend="mlx"), {"budget": 512, "buffer": 64})
store = Disk(Path(sys.argv[1]), 10**9, backend.take, backend.reopen)
cache = backend.new_cache(None)
backend.read(cache, list(range(3, 190)) * 2)
print("ready", flush=True)
for i in range(10**6):
    store.put(Key(374, f"{i:064x}"), cache, wait=True)
"""


def test_kill_9_in_a_write_loses_nothing_that_was_there(demo_mlx, tmp_path):
    backend = backend_for(*demo_mlx, {"budget": 512, "buffer": 64})
    before = 0
    for pause in (0.05, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = opened(tmp_path, backend)
        # no half of a file is left, and each whole one opens
        left = names(tmp_path)
        assert all(name.endswith(".kvret") and name.startswith("374-") for name in left)
        assert len(left) >= max(before, 1)
        before = len(left)
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert read_snapshot(newest).seen == 374
        store.close()
        for path in tmp_path.iterdir():
            read_snapshot(path)
    assert os.listdir(tmp_path)
