"""The process: one listening socket, uvicorn in front of the application, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigError, RankLost
from .app import Service, app_of

# after the requests' own end, for their last words to be sent
GRACE = 5.0


class Serving(uvicorn.Server):
    """uvicorn's server, which drains on SIGTERM and ctrl-C, and ends at once on a second one."""

    def __init__(self, service: Service, ready: Callable[[str], None] | None = None) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app_of(service),
                http=_timed(settings.head_time),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(max(1, settings.head_time)),
                timeout_graceful_shutdown=int(settings.drain + GRACE + 1),
                limit_concurrency=settings.connections,
            )
        )
        self._service, self._ready = service, ready
        # connections that end, and since when
        self._closing: dict[Any, float] = {}

    def run_until_told(self) -> None:
        """Serve until a signal comes; all requests have ended then, and all snapshots are written.

        Raises:
            ConfigError: the address is taken, or not this machine's.
            RankLost: of several ranks one is gone, or the first one's generation thread has ended.
        """
        try:
            listening = listen(self._service.settings.host, self._service.settings.port)
        except ConfigError:
            self._end()
            raise
        try:
            if self._ready is not None:
                self._ready(address_of(listening))
            self.run(sockets=[listening])
        finally:
            listening.close()
            self._end()
        if isinstance(self._service.worker.error, RankLost):
            raise self._service.worker.error

    def _end(self) -> None:
        self._service.worker.drain(0)
        self._service.worker.join()

    def stop(self) -> None:
        """Take no more requests, and end when those that run have; from any thread."""
        self._service.worker.drain(self._service.settings.drain)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        worker = self._service.worker
        if worker.told_to_end() or isinstance(worker.error, RankLost):
            self.stop()
        # what is sent to a client that takes nothing would wait for ever
        now = time.monotonic()
        closing = [one for one in self.server_state.connections if one.transport.is_closing()]
        self._closing = {one: self._closing.get(one, now) for one in closing}
        for one, since in self._closing.items():
            if now - since > self._service.settings.write_time:
                one.transport.abort()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            self.force_exit = True
            self._service.worker.drain(0)
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at the end; an orderly end is none."""
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # not the main thread
                    stack.callback(signal.signal, number, signal.signal(number, self.handle_exit))
            yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: with what is in the way.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or --port"
        ) from error
    return listening


def address_of(listening: socket.socket) -> str:
    """Where clients find the server."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _timed(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which waits for a request's head no longer than so many seconds."""

    class Timed(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # the next request may have come already
            if self.cycle is None or self.cycle.response_complete:
                self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self._cancel()
            self._timer = self.loop.call_later(seconds, self._too_slow)

        def _cancel(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self.transport.abort()

    return Timed
