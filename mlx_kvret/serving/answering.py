"""An answer on its way from the generation thread to a client that may leave at any time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .failures import Refusal
from .guard import told
from .job import Job, Piece
from .replies import DONE, WAITING, Reply, event
from .within import within
from .worker import Worker

News = Piece | Refusal
# seconds without a token after which a stream begins with a comment, so that nobody takes it for dead
SILENCE = 10.0


class Answer(Response):
    """Submits a job and sends what comes of it, as a stream or whole.

    Args:
        job: makes the job, with a function that takes its news in the generation thread.
    """

    def __init__(
        self, worker: Worker, job: Callable[[Callable[[News], None]], Job], reply: Reply, stream: bool
    ) -> None:
        self.background = None
        self._worker, self._make, self._reply, self._stream = worker, job, reply, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        news, loop = asyncio.Queue[News](), asyncio.get_running_loop()

        def tell(piece: News) -> None:
            # of a loop that is over nobody reads
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(news.put_nowait, piece)

        job = self._make(tell)
        try:
            self._worker.submit(job)
        except Refusal as refusal:
            await told(refusal)(scope, receive, send)
            return
        sending = loop.create_task(self._send(news, scope, receive, send))
        leaving = loop.create_task(_gone(receive))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            # whatever ended this, a client that reads no more needs no more tokens
            job.cancelled = True
            self._worker.wake()
            for task in (sending, leaving):
                task.cancel()
            done = await asyncio.gather(sending, leaving, return_exceptions=True)
        if isinstance(done[0], Exception) and not isinstance(done[0], (OSError, asyncio.TimeoutError)):
            raise done[0]

    async def _send(self, news: asyncio.Queue[News], scope: Scope, receive: Receive, send: Send) -> None:
        if self._stream:
            await self._send_stream(news, scope, receive, send)
            return
        pieces = list[Piece]()
        while not pieces or pieces[-1].reason is None:
            found = await news.get()
            if isinstance(found, Refusal):
                await told(found)(scope, receive, send)
                return
            pieces.append(found)
        shown = pieces[-1].shown is not None
        body = await asyncio.to_thread(self._reply.body, pieces) if shown else self._reply.body(pieces)
        await JSONResponse(body)(scope, receive, send)

    async def _send_stream(
        self, news: asyncio.Queue[News], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """What fails before the first token still has a status of its own; what has come goes at once."""
        begun = last = False
        async for come in _with_silence(news):
            if not begun and come and isinstance(come[0], Refusal):
                await told(come[0])(scope, receive, send)
                return
            events = []
            if not begun:
                await send(_START)
                events += self._reply.first()
            begun = True
            for found in come:
                if isinstance(found, Refusal):
                    events.append(event(found.body))
                else:
                    events += await self._events(found)
                    if found.reason is not None:
                        events.append(DONE)
                last = _last(found)
            await send(
                {"type": "http.response.body", "body": b"".join(events) or WAITING, "more_body": not last}
            )

    async def _events(self, piece: Piece) -> list[bytes]:
        """Beside the loop where it takes long."""
        if piece.shown is None:
            return list(self._reply.events(piece))
        return await asyncio.to_thread(lambda: list(self._reply.events(piece)))


_START: Any = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ],
}


async def _with_silence(news: asyncio.Queue[News]) -> AsyncIterator[list[News]]:
    """The news until the last, as many as have come; none for every while without any."""
    last = False
    while not last:
        come = list[News]()
        with contextlib.suppress(asyncio.TimeoutError):
            come.append(await within(SILENCE, news.get()))
        while come and not news.empty():
            come.append(news.get_nowait())
        yield come
        last = any(map(_last, come))


def _last(found: News) -> bool:
    return isinstance(found, Refusal) or found.reason is not None


async def _gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
