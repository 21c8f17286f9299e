"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..errors import ConfigError
from .answering import Answer
from .backend import Backend
from .channels import Plain, Splitter
from .drawing import Drawing
from .failures import Refusal
from .guard import Guard, body_of, told
from .job import Job, Prompt
from .metrics import exposition
from .prompts import Prompter
from .replies import ChatReply, CompletionReply, Reply
from .requests import Asked, ChatRequest, CompletionRequest, parsed
from .scheduler import Scheduler
from .settings import Settings
from .showing import history_of, routes, show
from .worker import Worker

log = logging.getLogger(__name__)
# bytes of a body that any number of clients may send at once
SMALL = 1 << 20
Prepared = tuple[Asked, Prompt, Splitter]


@dataclass
class Service:
    """All that the routes use.

    ``reader`` is a tokenizer that only decodes, in any thread; ``prompter`` has one of its own.
    """

    settings: Settings
    backend: Backend
    prompter: Prompter
    tokenizer: Any
    reader: Any
    worker: Worker
    scheduler: Scheduler

    def __post_init__(self) -> None:
        self.started = int(time.time())
        # one at a time, and beside the loop: a long prompt takes a while
        self.prompting = ThreadPoolExecutor(1, "kvret-prompts")
        self.large = asyncio.Semaphore(4)

    def decode(self, ids: list[int]) -> str:
        return str(self.reader.decode(ids))

    async def chat(self, request: Request) -> Response:
        asked, prompt, splitter = await self._prepared(request, self._chat)
        reply = ChatReply(self.settings.model, self.decode, asked.usage_in_stream)
        return self._answer(asked, prompt, reply, splitter)

    async def completion(self, request: Request) -> Response:
        asked, prompt, splitter = await self._prepared(request, self._completion)
        reply = CompletionReply(self.settings.model, self.decode, asked.usage_in_stream)
        return self._answer(asked, prompt, reply, splitter)

    async def _prepared(self, request: Request, prepare: Callable[[bytes], Prepared]) -> Prepared:
        """What a request asks for; of large ones only a few are held at once."""
        length = request.headers.get("content-length", "")
        small = length.isdecimal() and len(length) < 19 and int(length) <= SMALL
        async with contextlib.AsyncExitStack() as stack:
            if not small:
                await stack.enter_async_context(self.large)
            body = await body_of(request, self.settings)
            return await asyncio.get_running_loop().run_in_executor(self.prompting, prepare, body)

    def _chat(self, body: bytes) -> Prepared:
        asked = parsed(ChatRequest, body)
        self._check(asked)
        prompt = self.prompter.chat(asked)
        tools = None if asked.tools is None else [tool.model_dump(exclude_none=True) for tool in asked.tools]
        return asked, prompt, self.backend.splitter(self.tokenizer, prompt.ids.tolist(), tools)

    def _completion(self, body: bytes) -> Prepared:
        asked = parsed(CompletionRequest, body)
        self._check(asked)
        return asked, self.prompter.completion(asked), Plain()

    def _check(self, asked: Asked) -> None:
        """What only the server knows of: its model, its limits and its vocabulary."""
        settings, most = self.settings, self.backend.eviction.budget
        if asked.model is not None and asked.model != settings.model:
            raise Refusal(
                404,
                f"the model {asked.model[:200]!r} is not here; this server has {settings.model!r}",
                param="model",
                code="model_not_found",
            )
        if asked.limit is not None and asked.limit > settings.max_tokens:
            raise Refusal(
                400,
                f"max_tokens is {asked.limit:,}; this server gives at most {settings.max_tokens:,}",
                param="max_tokens",
            )
        if asked.kv_budget is not None and asked.kv_budget > most:
            eviction = self.backend.eviction
            own, least = (
                self.backend.shape.held_by(replace(eviction, budget=budget))
                for budget in (asked.kv_budget, most)
            )
            raise Refusal(
                400,
                f"kv_budget is {asked.kv_budget:,} tokens per KV head, which takes "
                f"{own:,} bytes and can never fit; this server gives at most {most:,} ({least:,} bytes)",
                param="kv_budget",
            )
        if asked.kv_history and not settings.page:
            raise Refusal(400, "this server was started with --no-page; drop kv_history", param="kv_history")
        for name in asked.logit_bias or ():
            known = self.backend.vocabulary
            if not (name.isascii() and name.isdecimal()) or (known is not None and int(name[:12]) >= known):
                raise Refusal(
                    400,
                    f"logit_bias names the token {name[:40]!r}, the model's are 0 to {(known or 0) - 1}",
                    param="logit_bias",
                )

    def _answer(self, asked: Asked, prompt: Prompt, reply: Reply, splitter: Splitter) -> Response:
        settings, most = self.settings, asked.limit or self.settings.max_tokens
        history = history_of(self.backend, asked, prompt, most)
        drawing = Drawing(
            settings.temp if asked.temperature is None else asked.temperature,
            1.0 if asked.top_p is None else asked.top_p,
            asked.seed,
            {int(token): added for token, added in (asked.logit_bias or {}).items()},
            asked.presence_penalty or 0.0,
            asked.frequency_penalty or 0.0,
        )

        def job(tell: Callable[[Any], None]) -> Job:
            return Job(
                prompt,
                drawing,
                most,
                self.backend.ends,
                splitter,
                tell,
                self.decode,
                asked.stops,
                asked.wanted_logprobs,
                asked.kv_budget,
                time.monotonic() + settings.timeout,
                history,
                show(self.backend, settings.model, self.decode, asked.kv_budget),
            )

        return Answer(self.worker, job, reply, bool(asked.stream))

    # ------------------------------------------------------------- about the server

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.model:
            raise Refusal(404, f"the model {name[:200]!r} is not here", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model, "object": "model", "created": self.started, "owned_by": "mlx-kvret"
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        failed = self.scheduler.metrics.failed_steps
        if not self.worker.alive:
            return JSONResponse({"status": "dead", "failed_steps": failed}, 503)
        status = "stopping" if self.worker.stopping else "ok"
        return JSONResponse({"status": status, "failed_steps": failed}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        scheduler, row = self.scheduler, self.backend.shape.held_by(self.backend.eviction)
        gauges = {
            "running": (scheduler.running, "Requests that read or decode."),
            "waiting": (max(self.worker.open - scheduler.running, 0), "Requests that wait for room."),
            "rows": (scheduler.rows, "Requests that fit at once."),
            "row_bytes": (row, "KV memory of one request."),
            "snapshots": (len(scheduler.prefixes), "Snapshots in memory."),
            "snapshot_bytes": (scheduler.prefixes.nbytes, "Memory of snapshots."),
            "snapshot_limit_bytes": (scheduler.prefixes.limit, "Memory that snapshots may take."),
        }
        return PlainTextResponse(
            exposition(scheduler.metrics, gauges), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def app_of(service: Service) -> Guard:
    """The application, guarded."""
    paths = [
        Route("/v1/chat/completions", _refusing(service.chat), methods=["POST"]),
        Route("/v1/completions", _refusing(service.completion), methods=["POST"]),
        Route("/v1/models", _refusing(service.models), methods=["GET"]),
        Route("/v1/models/{name:path}", _refusing(service.model), methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
        *(routes() if service.settings.page else ()),
    ]
    app = Starlette(routes=paths, exception_handlers={HTTPException: _http})
    return Guard(app, service.settings, service.scheduler.metrics.responses)


def _refusing(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return told(refusal)
        except ConfigError as error:
            return told(Refusal(400, str(error)))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:  # a fault of ours; the client is told in the shape it reads
            log.exception("a request failed")
            return told(Refusal(500, "the server failed at this request; its log says where"))

    return run


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    found = {404: f"there is nothing at {path}", 405: f"{path} takes no {request.method[:20]}"}
    return told(Refusal(error.status_code, found.get(error.status_code, error.detail)))
