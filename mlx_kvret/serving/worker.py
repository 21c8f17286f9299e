"""The one thread that owns the model and all caches: streams and graphs of a backend are a thread's own."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable

from ..core.line import PAUSE
from ..errors import RankLost
from .failures import Refusal, failed, stopping
from .job import Job
from .scheduler import Scheduler

log = logging.getLogger(__name__)
# how long to wait for news where only the disk can bring any
SHORTLY = 0.005


class Worker:
    """Takes requests from any thread and works on them in its own.

    Args:
        make: makes the scheduler, in the thread that will use it.
        rows, queue: how many may run, and how many more may wait.
    """

    def __init__(self, make: Callable[[], Scheduler], rows: int, queue_size: int) -> None:
        self.rows, self.queue_size = rows, queue_size
        self._make = make
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="kvret-generation", daemon=True)
        self._ready = threading.Event()
        self.error: BaseException | None = None
        self.scheduler: Scheduler | None = None

    def start(self) -> Scheduler:
        """Begin; what the scheduler was made with is there when this returns.

        Raises:
            What making it raised.
        """
        self._thread.start()
        self._ready.wait()
        if self.error is not None:
            raise self.error
        assert self.scheduler is not None
        return self.scheduler

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        return self._stop_at is not None

    @property
    def open(self) -> int:
        """Requests that have been taken and not been answered."""
        return self._open

    def submit(self, job: Job) -> None:
        """Take a request.

        Raises:
            Refusal: 429 if as many wait as may, 503 if the server is stopping or its thread has ended.
        """
        tell = job.tell

        def told(news: object) -> None:
            # before the news, so that who has read it can be sure of the room
            if isinstance(news, Refusal) or news.reason is not None:  # type: ignore[attr-defined]
                with self._lock:
                    self._open -= 1
            tell(news)  # type: ignore[arg-type]

        with self._lock:
            if self._stop_at is not None or not self.alive:
                raise stopping()
            if self._open >= self.rows + self.queue_size:
                raise self._full()
            self._open += 1
        job.tell = told
        self._inbox.put(job)

    def _full(self) -> Refusal:
        assert self.scheduler is not None
        seconds = self.scheduler.metrics.usual * (self._open - self.rows + 1) / self.rows
        wait = max(1, min(600, math.ceil(seconds)))
        return Refusal(
            429,
            f"{self.rows} conversations run, as many as fit, and {self._open - self.rows} wait, as many as "
            f"may; try again in {wait} s",
            code="queue_full",
            wait=wait,
        )

    def wake(self) -> None:
        """Have the thread look again, at jobs that were cancelled too."""
        self._inbox.put(None)

    def drain(self, seconds: float) -> None:
        """Take no more requests; those that run may go on for so long."""
        with self._lock:
            if self._stop_at is None:
                self._stop_at = time.monotonic() + seconds
        self.wake()

    def told_to_end(self) -> bool:
        """Whether someone else than this process has been told so."""
        return self.scheduler is not None and self.scheduler.engine.leaving

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    # ------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            scheduler = self.scheduler = self._make()
        except BaseException as error:
            self.error = error
            return
        finally:
            self._ready.set()
        try:
            while not (self._stop_at is not None and scheduler.idle and self._inbox.empty()):
                self._turn(scheduler)
            scheduler.close()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            log.exception("the generation thread ends")
            self.error = error
            if scheduler.beat is not None and not isinstance(error, RankLost):
                # the other ranks would wait for this one's next word
                self.error = RankLost(f"the first rank failed ({error!r}); start all of them again")
            with self._lock:
                self._stop_at = 0.0
            self._end(scheduler, failed(error))

    def _turn(self, scheduler: Scheduler) -> None:
        resting = scheduler.idle and self._stop_at is None
        self._take(
            scheduler, block=resting, timeout=PAUSE if resting and scheduler.beat is not None else None
        )
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            self._end(scheduler, stopping())
        elif not scheduler.turn() and not scheduler.idle:
            self._take(scheduler, timeout=SHORTLY)

    def _take(self, scheduler: Scheduler, block: bool = False, timeout: float | None = None) -> None:
        """All jobs that have come, waiting for one if there is nothing else to do."""
        try:
            found = self._inbox.get(block or timeout is not None, timeout)
            while True:
                if found is not None:
                    scheduler.add(found)
                found = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _end(self, scheduler: Scheduler, refusal: Refusal) -> None:
        self._take(scheduler)
        scheduler.fail_all(refusal)
