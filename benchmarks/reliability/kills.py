"""Writers ended by ``kill -9`` at any moment: what they leave is the old file whole or the new one.

    python benchmarks/reliability/kills.py [--kills 100] [--runs 3]

Saving caches, converting gates and adding results is done by forked processes that are killed after up to
``MOST`` seconds; a training run is killed ``--runs`` times and resumed, and must end with the very weights
of one left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.snapshot import Snapshot, read_snapshot, write_snapshot
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import KVRetError

MOST = 0.05
# how often a writer was met in the middle of its work, and what was wrong
Found = tuple[int, list[str]]


def killed(work: Callable[[], object], rng: random.Random) -> None:
    """Do ``work`` over and over in a forked process until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    time.sleep(rng.uniform(0, MOST))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("the writer ended by itself")


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def saves(folder: Path, kills: int, rng: random.Random) -> Found:
    """Caches over one another; every one holds one number in all of its entries."""
    faults, middle, path = [], 0, folder / "cache.safetensors"

    def save(number: int) -> None:
        entries = 4 * 2000
        write_snapshot(
            path,
            Snapshot(
                model="m",
                gates="g",
                eviction=EvictionConfig(2000, 10),
                seen=2000,
                counts=np.full((2, 2), 2000, np.int32),
                position=np.tile(np.arange(2000, dtype=np.int32), 4),
                retention=np.full(entries, -float(number + 1), np.float32),
                keys=Tensor.of(np.full((entries, 8), number, np.float32)),
                values=Tensor.of(np.full((entries, 8), number, np.float32)),
                notes={"number": str(number)},
            ),
        )

    save(0)
    for number in range(1, kills + 1):
        killed(lambda number=number: save(number), rng)
        middle += bool(hidden(folder))
        try:
            found = read_snapshot(path)
            here = set(found.keys.bits.ravel()) | set(found.values.bits.ravel())
            if here != {float(found.notes["number"])} or int(found.notes["number"]) > number:
                faults.append(f"kill {number}: mixed contents")
        except KVRetError as error:
            faults.append(f"kill {number}: {error}")
    save(0)
    return middle, faults + [f"left behind: {name}" for name in hidden(folder)]


def conversions(folder: Path, kills: int, rng: random.Random) -> Found:
    """Gates into new folders, which are whole or not there."""
    from mlx_kvret.converters import convert, load_any

    faults, middle, whole = [], 0, load_any(demo.GATES)

    def make(number: int) -> Iterator[None]:
        for turn in range(10**6):
            convert(demo.GATES, folder / f"{number}-{turn}", "torch")
            yield

    for number in range(kills):
        turns = make(number)
        killed(lambda turns=turns: next(turns), rng)
        middle += bool(hidden(folder))
        for found in folder.glob(f"{number}-*"):
            try:
                same = load_any(found).tensors
                if any(same[n].bits.tobytes() != t.bits.tobytes() for n, t in whole.tensors.items()):
                    faults.append(f"kill {number}: other weights")
            except KVRetError as error:
                faults.append(f"kill {number}: {error}")
    convert(demo.GATES, folder / "last", "shared")
    return middle, faults + [f"left behind: {name}" for name in hidden(folder)]


def results(folder: Path, kills: int, rng: random.Random) -> Found:
    """Cells of an evaluation, added one by one: each run goes on where the last one was killed."""
    from mlx_kvret.evaluation.results import Cell, open_results, read_results

    faults, middle, path, before = [], 0, folder / "results.json", 0

    def add() -> None:
        found = open_results(path, {"model": "m"}, {})
        number = len(found.cells)
        found.add(Cell("facts", number, "1/4", "recent", "", "mlx", "exact", (0.5,) * 20, 1.0, 1.0))

    for number in range(kills):
        killed(add, rng)
        middle += bool(hidden(folder))
        try:
            cells = len(read_results(path).cells) if path.exists() else 0
            if cells < before:
                faults.append(f"kill {number}: {before - cells} cells are gone")
            before = cells
        except KVRetError as error:
            faults.append(f"kill {number}: {error}")
    add()
    return middle, faults + [f"left behind: {name}" for name in hidden(folder)]


COMMAND = (
    "train demo --width 16 --bias 4 --budget 4 --length 64 --batch 2 --steps 30 --micro-batch 2 --device cpu "
    "--save-every 2 --no-recompute --backend torch --separate --learning-rate 0.01"
)


def trainings(folder: Path, kills: int, rng: random.Random) -> Found:
    """One run killed again and again, and one left alone."""
    data = folder / "data.jsonl"
    words = (demo.STORY.read_text().split() * 3)[:4000]
    data.write_text(
        "".join(json.dumps({"text": " ".join(words[i : i + 60])}) + "\n" for i in range(0, 3000, 60))
    )
    main = [
        sys.executable,
        "-c",
        "from mlx_kvret.cli import main; main()",
        *shlex.split(COMMAND),
        "--data",
        str(data),
    ]
    cut, alone = folder / "cut", folder / "alone"
    subprocess.run([*main, "--output", str(alone)], check=True, capture_output=True)
    faults, middle, log = [], 0, cut / "log.csv"
    for number in range(kills):
        resume = ["--resume"] if (cut / "training.safetensors").exists() else []
        process = subprocess.Popen(
            [*main, "--output", str(cut), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        lines, stop = _lines(log), rng.randrange(1, 8)
        while process.poll() is None and _lines(log) < lines + stop:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        _, errors = process.communicate()
        middle += process.returncode == -signal.SIGKILL
        if process.returncode not in (-signal.SIGKILL, 0):
            faults.append(f"kill {number}: {errors.decode()[-300:]}")
    end = subprocess.run([*main, "--output", str(cut), "--resume"], capture_output=True)
    if end.returncode:
        return middle, [*faults, f"cannot be resumed: {end.stderr.decode()[-300:]}"]
    one, other = (load_gates(run / "gates").tensors for run in (cut, alone))
    faults += [f"{name} differs" for name in one if one[name].bits.tobytes() != other[name].bits.tobytes()]
    return middle, faults + [f"left behind: {name}" for name in hidden(cut)]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def measured(kills: int, runs: int, seed: int = 0) -> dict[str, tuple[int, int, list[str]]]:
    """What was killed, how often, how often in the middle of writing, and what was found wrong."""
    told = {}
    for what, work, count in (
        ("saving a cache", saves, kills),
        ("converting gates", conversions, kills),
        ("adding results of an evaluation", results, kills),
        ("training", trainings, runs),
    ):
        with tempfile.TemporaryDirectory() as folder:
            if count:
                told[what] = count, *work(Path(folder), count, random.Random(seed))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    for what, (count, middle, faults) in measured(options.kills, options.runs).items():
        print(f"{what}: killed {count} times, {middle} of them at work, {len(faults)} faults")
        for fault in faults[:5]:
            print(f"    {fault}")


if __name__ == "__main__":
    main()
