"""Who waits, who reads, who decodes. No threads: :meth:`Scheduler.turn` is one step of all rows."""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import RankLost
from .backend import Passes
from .engine import Engine
from .failures import Refusal, failed, gone, too_late
from .job import Job
from .metrics import Metrics
from .prefixes import PENDING, Prefixes

log = logging.getLogger(__name__)


class Scheduler:
    """Reads prompts by turns, a chunk at a time, and decodes all rows together.

    Args:
        rows: conversations that fit at once, reading or decoding.
        chunk: tokens of a prompt read in one forward pass; one prompt reads at a time.
        timeout: seconds a request may take, for the message.
        beat: what a turn does where there is nothing to do, if a turn is wanted then too.
    """

    def __init__(
        self,
        backend: Passes,
        engine: Engine,
        prefixes: Prefixes,
        metrics: Metrics,
        rows: int,
        chunk: int,
        timeout: float,
        beat: Callable[[], None] | None = None,
    ) -> None:
        self.backend, self.engine, self.prefixes, self.metrics = backend, engine, prefixes, metrics
        self.rows, self.chunk, self.timeout, self.beat = rows, chunk, timeout, beat
        self.waiting: deque[Job] = deque()
        self.reading: deque[Job] = deque()
        self.decoding: dict[int, Job] = {}

    @property
    def running(self) -> int:
        return len(self.reading) + len(self.decoding)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    def turn(self) -> bool:
        """Let go who has left, let in who fits, read a chunk of one prompt, decode a token of every row.

        False if all there is to do is to wait for snapshots from the disk.
        """
        self._sweep()
        while self.waiting and self.running < self.rows:
            self.reading.append(self.waiting.popleft())
        worked = bool(self.decoding)
        for _ in range(len(self.reading)):
            # one chunk; those before it whose snapshot is still on its way wait
            if self._read(self.reading.popleft()):
                worked = True
                break
        if self.decoding:
            self._decode()
        if self.beat is not None and self.idle:
            self.beat()
        return worked

    def fail_all(self, refusal: Refusal) -> None:
        """End every request."""
        for job in [*self.waiting, *self.reading, *self.decoding.values()]:
            job.end(refusal)
        self.waiting.clear()
        self.reading.clear()
        self.decoding.clear()
        self.engine.reset()

    def close(self) -> None:
        """Put all snapshots where they outlive the process, if there is such a place."""
        with self._failing([]):
            self.prefixes.close()
        self.engine.close()

    # ---------------------------------------------------------------- reading

    def _start(self, job: Job) -> None:
        """Go on from the longest snapshot there is; PENDING leaves the job where it is."""
        sights, last = job.prompt.sights, len(job.prompt.ids) - 1
        key = None if sights is not None else self.prefixes.longest(job.prefix, last)
        while key is not None and job.cache is None:
            job.cache = self.prefixes.get(key)
            self._descends(job, self.prefixes.kept(key))
            job.read = job.cached = key.length
            if job.cache is None:
                key = self.prefixes.longest(job.prefix, key.length - 1)
        if job.cache is None:
            job.cache, job.read, job.cached = self.backend.new_cache(job.budget), 0, 0
            if sights is not None:
                job.looking = self.backend.looking(job.cache, sights.take(), self.chunk)
        elif job.cache is PENDING:
            job.cache = None
            return
        self.metrics.started(len(job.prompt.ids), job.cached)

    def _read(self, job: Job) -> bool:
        """A chunk of a prompt, or its passing on to the rows that decode; whether there was any of it."""
        with self._failing([job]):
            if job.cache is None:
                self._start(job)
            if job.cache is None:
                self.reading.append(job)
                return False
            job.follow(lambda: job.cache)
            if job.unread > 0:
                if job.looking is not None:
                    end = next(job.looking)
                else:
                    end = job.next_end(self.chunk)
                    self.backend.read(job.cache, job.prompt.ids[job.read : end].tolist())
                job.read = end
                job.follow(lambda: job.cache)
                if end in job.prompt.marks:
                    cache = job.cache
                    key = job.prefix.key(end)
                    pinned = end in job.prompt.pinned
                    kept = self.prefixes.put(key, lambda: self.backend.copy(cache), pinned, job.parent())
                    self._descends(job, kept)
            if job.unread > 0:
                self.reading.append(job)
                return True
            cache, job.cache, job.looking = job.cache, None, None
            row = self.engine.join(cache, int(job.prompt.ids[-1]), self.backend.chooser(job.drawing))
            self.decoding[row] = job
        return True

    def _descends(self, job: Job, kept: Any) -> None:
        """A snapshot of the job's own past; another's of the same tokens may hold other entries."""
        if kept is not None:
            # it goes when the store lets go of it
            job.parent = weakref.ref(kept)

    # --------------------------------------------------------------- decoding

    def _decode(self) -> None:
        answered: list[tuple[Job, Any]] = []
        with self._failing(list(self.decoding.values()), self._drop_rows):
            for step in self.engine.step():
                job = self.decoding[step.row]
                piece = job.take(step.token, functools.partial(self.backend.host, step.logprobs))
                self.metrics.generated += 1
                if piece.reason is not None:
                    cache = self.engine.leave(step.row)
                    job.close(piece, cache)
                    del self.decoding[step.row]
                    answered.append((job, cache))
                else:
                    job.follow(functools.partial(self.engine.look, step.row))
                job.news(piece)
        for job, cache in answered:
            self.metrics.ended(job.begun)
            if job.prompt.sights is not None:
                continue
            with self._failing([]):
                ids = np.append(job.prompt.ids, job.answer)
                key = job.prefix.longer(ids).key(len(ids))
                self.prefixes.put(key, functools.partial(_same, cache), parent=job.parent())

    def _drop_rows(self) -> None:
        self.decoding.clear()
        self.engine.reset()

    # ----------------------------------------------------------------- ending

    def _sweep(self) -> None:
        """Let go of requests whose client has left or whose time is over."""
        now = time.monotonic()
        for row, job in list(self.decoding.items()):
            if (why := self._over(job, now)) is not None:
                del self.decoding[row]
                with self._failing([], self._drop_rows):
                    self.engine.leave(row)
                job.end(why)
        for line in (self.waiting, self.reading):
            over = [(job, why) for job in line if (why := self._over(job, now)) is not None]
            for job, why in over:
                line.remove(job)
                job.end(why)

    def _over(self, job: Job, now: float) -> Refusal | None:
        return gone() if job.cancelled else too_late(self.timeout) if now > job.until else None

    @contextmanager
    def _failing(self, jobs: list[Job], undo: Callable[[], None] | None = None) -> Iterator[None]:
        """A step that fails ends the requests that were in it, and nothing else."""
        try:
            yield
        except RankLost:  # nothing works any more
            raise
        except Exception as error:
            log.exception("a step failed")
            self.metrics.failed_steps += 1
            if undo is not None:
                jobs = [*jobs, *self.decoding.values()]
                undo()
            for job in jobs:
                job.end(failed(error))


def _same(cache: Any) -> Any:
    return cache
