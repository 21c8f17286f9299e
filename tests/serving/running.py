"""A server in this process, and the ways clients speak to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_kvret.serving.channels import Plain
from mlx_kvret.serving.drawing import Drawing
from mlx_kvret.serving.job import Job, Prompt
from mlx_kvret.serving.metrics import Metrics
from mlx_kvret.serving.prefixes import Prefixes
from mlx_kvret.serving.scheduler import Scheduler
from mlx_kvret.serving.server import Serving
from mlx_kvret.serving.settings import Settings
from mlx_kvret.serving.starting import Room, start

OPTIONS = {"budget": 32, "buffer": 8}
SETTINGS = Settings("demo", port=0, max_tokens=200, drain=5)
ROOM = Room(memory=40_000_000, rows=8, chunk=32)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Reply:
    """An HTTP response."""

    status: int
    headers: Any
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def events(self) -> list[Any]:
        """The events of a stream that ended as it should."""
        lines = [part[6:] for part in self.text.split("\n\n") if part.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


class Running:
    """A server that listens on loopback."""

    def __init__(self, model: Any, tokenizer: Any, options: Any, settings: Settings, room: Room) -> None:
        self.service, self.plan = start(model, tokenizer, options, settings, room)
        self.worker, self.scheduler = self.service.worker, self.service.scheduler
        self.backend, self.metrics = self.service.backend, self.service.scheduler.metrics
        ready, addresses = threading.Event(), []
        self.serving = Serving(self.service, lambda address: (addresses.append(address), ready.set()))
        self.thread = threading.Thread(target=self.serving.run_until_told)
        self.thread.start()
        assert ready.wait(30)
        self.url = addresses[0]
        self.port = int(self.url.rpartition(":")[2])

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own; underlines in headers' names are dashes."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, given)
            found = connection.getresponse()
            return Reply(found.status, found.headers, found.read().decode())

    def post(self, path: str, /, **body: Any) -> Reply:
        return self.ask("POST", path, json.dumps(body), Content_Type="application/json")

    def text(self, prompt: Any, /, **body: Any) -> str:
        """A completion that must succeed."""
        response = self.post(TEXT, prompt=prompt, **body)
        assert response.status == 200, response.text
        return response.json()["choices"][0]["text"]

    def raw(self, data: bytes, wait: float = 10.0) -> bytes:
        """What comes back for bytes on a fresh connection, until the server closes it or nothing comes."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.settimeout(wait)
            client.sendall(data)
            out = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while part := client.recv(65536):
                    out += part
            return out

    def until(self, true: Any, seconds: float = 10.0) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end
            time.sleep(0.005)

    @property
    def idle(self) -> bool:
        return self.worker.open == 0 and self.scheduler.idle

    def stop(self) -> None:
        self.serving.stop()
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.worker.alive


@contextlib.contextmanager
def running(loaded: Any, options: Any = OPTIONS, settings: Any = None, room: Any = None) -> Iterator[Running]:
    """A server whose settings and room differ as said."""
    made = Running(*loaded, options, replace(SETTINGS, **(settings or {})), replace(ROOM, **(room or {})))
    try:
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str], str]]:
    """``mlx-kvret serve``, what it says at its start, and where it listens."""
    code = "from mlx_kvret.cli import main; main()"
    line = [sys.executable, "-c", code, "serve", "--model", "demo", "--port", "0", "--memory", "20MB"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*line, *arguments], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said = list[str]()
            while not said or " at http://" not in said[-1]:
                said.append(process.stderr.readline())
                assert said[-1], said
            yield process, said, said[-1].split(" at ")[1].split("/v1")[0]
        finally:
            process.kill()


def request(path: str, body: bytes, *headers: str, host: str = "127.0.0.1") -> bytes:
    """The bytes of a POST that closes its connection."""
    head = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", "Connection: close"]
    head += headers or ("Content-Type: application/json",)
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def facts(count: int, start: int = 0) -> str:
    """Facts of the demo's language, none about Stella."""
    names = ["Ada", "Anna", "Bruno", "Clara", "Frank", "Hugo", "Ivan"]
    colours = ["amber", "black", "blue", "brown", "copper"]
    return " ".join(f"remember {names[i % 7]} {colours[i % 5]}" for i in range(start, start + count))


class Asking:
    """A scheduler without threads or HTTP, and what its jobs are told."""

    def __init__(self, backend: Any, engine: Any, limit: int = 10**8, rows: int = 8, **options: Any) -> None:
        pools = backend if options.pop("shares", True) else None
        prefixes = Prefixes(limit, backend.copy, options.pop("beside", None), pools)
        self.backend, self.metrics = backend, Metrics()
        self.scheduler = Scheduler(
            backend, engine, prefixes, self.metrics, rows, options.pop("chunk", 32), 60
        )
        assert not options

    def job(self, ids: list[int], marks: Any = None, **options: Any) -> Job:
        """A job that has been handed in; ``job.told`` is what it is told."""
        told = list[Any]()
        marks = frozenset({len(ids) - 1} - {0} if marks is None else marks)
        drawing = options.pop("drawing", Drawing())
        most = options.pop("max_tokens", 12)
        prompt = Prompt(
            np.array(ids, np.int32), marks, frozenset(options.pop("pinned", ())), options.pop("owner", ())
        )
        ends = options.pop("ends", frozenset())
        made = Job(prompt, drawing, most, ends, Plain(), told.append, str, top=0, **options)
        made.told = told
        self.scheduler.add(made)
        return made

    def run(self) -> None:
        """To the end of all jobs."""
        while not self.scheduler.idle:
            self.scheduler.turn()

    def answer(self, ids: list[int], marks: Any = None, **options: Any) -> Any:
        """Tokens and their log probabilities, of one job and those that run beside it."""
        job = self.job(ids, marks, **options)
        self.run()
        return answer(job)


def answer(job: Job) -> list[tuple[int, float]]:
    """Tokens and their log probabilities; the job must have ended well."""
    assert job.told[-1].reason is not None
    return [(one.token, one.logprob) for piece in job.told for one in piece.likely]
