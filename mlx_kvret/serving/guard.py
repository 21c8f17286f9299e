"""What stands before every route: who may ask, from which page, and how much."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections import Counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import Refusal
from .settings import Settings
from .showing import OPEN
from .within import within

# what browsers may read without asking first
_SAFE = ("GET", "HEAD")
# seconds for what is still coming of a body that is refused
LINGER = 2.0


class Guard:
    """ASGI middleware; counts ``responses`` by status."""

    def __init__(self, app: ASGIApp, settings: Settings, responses: Counter[int]) -> None:
        self._app, self._settings, self._responses = app, settings, responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        allowed = headers.get("origin") in self._settings.origins
        body, refused = _Body(receive), False
        receive = body.receive

        async def counted(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                self._responses[message["status"]] += 1
                refused = message["status"] >= 400
                added = MutableHeaders(scope=message)
                added["X-Content-Type-Options"] = "nosniff"
                if allowed:
                    added["Access-Control-Allow-Origin"] = headers["origin"]
                    added["Vary"] = "Origin"
            elif refused and not (body.whole or message.get("more_body", False)):
                await within(self._settings.write_time, send({**message, "more_body": True}))
                await body.hear_out(2 * self._settings.body)
                message = {"type": "http.response.body"}
            # a client that takes nothing is one that has gone
            await within(self._settings.write_time, send(message))

        try:
            self._check(scope, headers)
        except Refusal as refusal:
            await told(refusal)(scope, receive, counted)
            return
        if scope["method"] == "OPTIONS" and allowed:
            await _preflight()(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise a Refusal where a request may not go on."""
        settings = self._settings
        name = _host_name(headers.getlist("host"))
        if settings.names is not None and name not in settings.names:
            raise Refusal(
                403,
                "this server is not known by the name in the Host header; use 127.0.0.1, or start it with "
                "--allow-host",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in settings.origins and not _own(origin, headers):
            raise Refusal(
                403,
                "pages of this origin may not use this server; start it with --cors-origin to let them",
                code="origin_not_allowed",
            )
        if scope["method"] == "OPTIONS" or scope["path"] == "/health":
            return
        if settings.page and scope["method"] in _SAFE and scope["path"] in OPEN:
            return
        self._check_key(headers)
        if scope["method"] in _SAFE:
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the content type is {kind[:80]!r}; send application/json")

    def _check_key(self, headers: Headers) -> None:
        key = self._settings.api_key
        if key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refusal(
                401, "the API key is missing or wrong; send it as a bearer token", code="invalid_api_key"
            )


class _Body:
    """A request's body on its way.

    Where the connection ends amid it, TCP may drop the answer, and a router sees a server that died.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive, self.whole = receive, False

    async def receive(self) -> Message:
        message = await self._receive()
        self.whole = not message.get("more_body", False)
        return message

    async def hear_out(self, most: int) -> None:
        """Drop what is still to come, up to ``most`` bytes."""

        async def dropped() -> None:
            size = 0
            while not self.whole and size <= most:
                size += len((await self.receive()).get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(dropped(), LINGER)


async def body_of(request: Request, settings: Settings) -> bytes:
    """The body of a request.

    Raises:
        Refusal: 413 if it is too large, 408 if it is too slow.
        ClientDisconnect: the client has gone.
    """
    too_large = Refusal(
        413, f"the body has more than {settings.body:,} bytes; send less", code="body_too_large"
    )
    told_length = request.headers.get("content-length", "0")
    if not told_length.isdecimal() or len(told_length) > 18 or int(told_length) > settings.body:
        raise too_large

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > settings.body:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), settings.body_time)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body did not come within {settings.body_time:g} s; send it faster") from None


def told(refusal: Refusal) -> Response:
    """A refusal as a response. After one of the body itself the connection ends."""
    headers = refusal.headers | ({"Connection": "close"} if refusal.status in (408, 413) else {})
    return JSONResponse(refusal.body, refusal.status, headers)


def _preflight() -> Response:
    headers = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "Authorization, Content-Type",
        "Access-Control-Max-Age": "600",
    }
    return Response(status_code=204, headers=headers)


def _host_name(hosts: list[str]) -> str | None:
    """The name in the one Host header, without its port."""
    if len(hosts) != 1:
        return None
    host = hosts[0].strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _own(origin: str, headers: Headers) -> bool:
    """Whether a page comes from this server itself."""
    return origin.partition("://")[2].lower() == headers.get("host", "").lower()
