"""What a server shows of its caches: the page at ``/``, and the history that a request may ask for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..core.detokenizer import token_texts
from ..core.history import History, described
from ..page.files import read
from .backend import Backend
from .failures import Refusal
from .job import Prompt
from .requests import Asked

# entries whose fate is noted for one request, 4 bytes each
MOST = 1 << 23
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_NAMES = ("view.js", "talk.js", "style.css", "talk.css")
# paths that hold no secret, so that a browser may have them before it has a key
OPEN = frozenset({"/", *(f"/page/{name}" for name in _NAMES)})
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """Of the page, whose files are as they are in the package."""
    found = [Route("/", _file("talk.html"), methods=["GET"])]
    return found + [Route(f"/page/{name}", _file(name), methods=["GET"]) for name in _NAMES]


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        kind = f"{_KINDS[name.rpartition('.')[2]]}; charset=utf-8"
        return Response(read(name), media_type=kind, headers=_HEADERS)

    return send


def history_of(backend: Backend, asked: Asked, prompt: Prompt, most: int) -> History | None:
    """What takes in which entries go, if a request wants that; ``most`` tokens its answer may have.

    Raises:
        Refusal: its notes would be larger than all requests may have.
    """
    if not asked.kv_history:
        return None
    shape, tokens = backend.shape, len(prompt.ids) + most
    if tokens * shape.heads > MOST:
        raise Refusal(
            400,
            f"kv_history takes notes of {tokens:,} tokens (prompt and max_tokens) in {shape.heads} KV heads; "
            f"this server does so for at most {MOST // shape.heads:,}: drop it, or ask for fewer",
            param="kv_history",
        )
    return History(shape.layers, shape.kv_heads)


def show(
    backend: Backend, model: str, decode: Callable[[list[int]], str], budget: int | None
) -> Callable[[History, list[int], int], dict[str, Any]]:
    """What makes of a history and all tokens the data that a page draws."""
    return partial(_shown, backend, model, decode, budget)


def _shown(
    backend: Backend,
    model: str,
    decode: Callable[[list[int]], str],
    budget: int | None,
    history: History,
    ids: list[int],
    cached: int,
) -> dict[str, Any]:
    eviction = backend.eviction
    texts = token_texts(ids, decode)
    data = described(history, texts, backend.shape, backend.layers, eviction, model)
    return data | {"cached": cached} | ({} if budget is None else {"budget": budget})
