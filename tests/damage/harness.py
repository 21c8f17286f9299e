"""Damaged files of every form, read in a process that may die or hang: what became of each."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Job = tuple[str, int, int]
TESTS = Path(__file__).parents[1]
# seconds of the processor that a case may take
SLOW = 2.0
# a process hangs that is silent for so long on the clock and works for so long, or is silent for very long
HANGS, BUSY, DEAD = 30.0, 60.0, 900.0
GOOD = ("same", "other", "refused")


@dataclass
class Outcome:
    """How the cases of one form ended, and what was wrong with which."""

    form: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.counts.total()

    def add(self, told: dict[str, Any]) -> None:
        """Take in what the worker tells of a case."""
        kind, how = told["outcome"].split()[0].rstrip(":"), told["how"]
        if told["seconds"] > SLOW:
            self.fault("hang", told["end"], f"{how}: {told['seconds']:.1f} s of the processor")
        elif kind in GOOD:
            self.counts[kind] += 1
        else:
            self.fault(kind, told["end"], f"{how}: {told['outcome']}")

    def fault(self, kind: str, number: int, what: str) -> None:
        self.counts[kind] += 1
        self.faults.append(f"{self.form}, case {number}: {kind}, {what}")


def run(
    jobs: Iterable[Job], seconds: float | None = None, outcomes: dict[str, Outcome] | None = None
) -> dict[str, Outcome]:
    """Cases by form, from a first up to a last; fewer where ``seconds`` are over.

    ``outcomes``, if given, is filled as they end, for callers that may be stopped.
    """
    left, outcomes = list(jobs), {} if outcomes is None else outcomes
    ends = None if seconds is None else time.monotonic() + seconds
    while left and (ends is None or time.monotonic() < ends):
        left = _some(outcomes, left, ends)
    return outcomes


def _some(outcomes: dict[str, Outcome], jobs: list[Job], ends: float | None) -> list[Job]:
    """Cases until the process ends; returns what is left."""
    command = [sys.executable, "-m", "damage.worker", json.dumps(jobs)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"PYTHONPATH": paths}
        )
        running: tuple[str, int] | None = None
        try:
            for line in _lines(process):
                if line is None:
                    break
                told = json.loads(line)
                outcome = outcomes.setdefault(told["form"], Outcome(told["form"]))
                if "begin" in told:
                    running = told["form"], told["begin"]
                    continue
                outcome.add(told)
                running, jobs = None, _after(jobs, told["form"], told["end"])
                if ends is not None and time.monotonic() > ends:
                    return jobs
            hangs = process.poll() is None and not _ended(process)
            if running is not None:
                what = "no answer" if hangs else f"ended with {process.returncode}"
                outcomes[running[0]].fault("hang" if hangs else "crash", running[1], what)
                return _after(jobs, *running)
            if jobs:
                errors.seek(0)
                told = errors.read().decode(errors="replace")[-3000:]
                raise RuntimeError(f"no case of {jobs[0][0]} could be run: {told}")
            return jobs
        finally:
            process.kill()
            process.communicate()


def _after(jobs: list[Job], form: str, number: int) -> list[Job]:
    """What is left behind a case."""
    place = next(i for i, job in enumerate(jobs) if job[0] == form)
    _, _, last = jobs[place]
    return [(form, number + 1, last)] * (number + 1 < last) + jobs[place + 1 :]


def _ended(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    return process.returncode is not None


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """Lines of the process's output; None where it is silent for too long.

    A busy machine may leave it waiting: while it does next to nothing it is given more of the clock.
    """
    assert process.stdout is not None
    waiting, since, used = b"", time.monotonic(), _processor(process.pid)
    while True:
        if not select.select([process.stdout], [], [], 1.0)[0]:
            silent, worked = time.monotonic() - since, _processor(process.pid) - used
            if silent > DEAD or (silent > HANGS and worked > BUSY):
                yield None
                return
            continue
        content = os.read(process.stdout.fileno(), 1 << 16)
        if not content:
            return
        *lines, waiting = (waiting + content).split(b"\n")
        yield from lines
        since, used = time.monotonic(), _processor(process.pid)


def _processor(pid: int) -> float:
    """Seconds of the processor a process has used; those of the clock where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return time.monotonic()
