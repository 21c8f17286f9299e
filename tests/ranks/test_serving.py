"""A server over several processes answers as one does, and all of them end together, however it comes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving.running import CHAT, OPTIONS, ROOM, SETTINGS, TEXT, running, user

import mlx_kvret
from mlx_kvret.core import watch
from mlx_kvret.core.line import WORDS, Line
from mlx_kvret.errors import RankLost
from mlx_kvret.serving.deeds import drawing_of, told_of
from mlx_kvret.serving.drawing import Drawing
from mlx_kvret.serving.server import Serving
from mlx_kvret.serving.starting import start

from .processes import HERE, gloo, ring
from .threads import together

STORY = "remember Anna amber. remember Ivan copper. " + "Bob went home. " * 30
ASKED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": user(STORY + "recall Anna"), "max_tokens": 8}),
    (CHAT, {"messages": user(STORY + "recall Anna"), "max_tokens": 8, "kv_budget": 24}),
    (TEXT, {"prompt": STORY + "recall Ivan", "max_tokens": 20, "logprobs": 3}),
    (TEXT, {"prompt": STORY, "max_tokens": 25, "temperature": 1.0, "seed": 7}),
    (TEXT, {"prompt": STORY, "max_tokens": 25, "temperature": 0.7, "seed": 7, "presence_penalty": 1.0}),
    (TEXT, {"prompt": "remember Ada blue. Bob went home.", "max_tokens": 25, "stop": ["."]}),
    (TEXT, {"prompt": STORY, "max_tokens": 12, "kv_history": True}),
]
NEVER_ENDS = {"prompt": STORY, "max_tokens": 3000, "logit_bias": {"0": -100, "1": -100}}


class Several:
    """``mlx-kvret serve`` in several processes, and where it listens."""

    def __init__(self, told: list[dict[str, str]], options: list[str], wait: float) -> None:
        base = os.environ | {"MLX_KVRET_RANK_TIMEOUT": str(wait), "PYTHONPATH": str(HERE.parents[1])}
        line = [sys.executable, "-m", "mlx_kvret", "serve", "--model", "demo", "--port", "0", *options]
        self.processes = [
            subprocess.Popen(
                line, env=base | own, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for own in told
        ]
        self.said = list[str]()
        while not self.said or " at http://" not in self.said[-1]:
            self.said.append(self.processes[0].stderr.readline())
            assert self.said[-1], self.said
        self.port = int(self.said[-1].split(" at http://")[1].split("/")[0].rpartition(":")[2])

    def ask(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            found = connection.getresponse()
            return found.status, json.loads(found.read())

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"mlx_kvret_{name} ")))

    def ends(self) -> tuple[list[int], list[str]]:
        """The status of each process and what it said last; they have a minute."""
        done = [process.communicate(timeout=60)[1] for process in self.processes]
        return [process.returncode for process in self.processes], done


@contextlib.contextmanager
def several(told: list[dict[str, str]], *options: str, wait: float = 30) -> Iterator[Several]:
    made = None
    try:
        made = Several(told, ["--memory", "20MB", "--budget", "32", *options], wait)
        yield made
    finally:
        for process in made.processes if made else ():
            process.kill()
            process.wait()


def plain(answer: Any) -> Any:
    """An answer without what each one has for itself."""
    choice = {name: value for name, value in answer["choices"][0].items() if name != "logprobs"}
    usage = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "kv_entries")}
    history = answer.get("kv_history")
    return choice, usage, None if history is None else history["gone"]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_as_one_process(backend: str, tmp_path: Path) -> None:
    """One after the other, then all at once from snapshots; a client leaves, and a signal ends all."""
    told = ring(2, tmp_path) if backend == "mlx" else gloo(2, tmp_path)
    asked = ASKED if backend == "mlx" else ASKED[2:5]
    with several(told) as server:
        first = [server.ask(path, body) for path, body in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            again = list(pool.map(lambda one: server.ask(*one), asked))
        hits = server.metric("prefix_hits_total")
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps(NEVER_ENDS | {"stream": True})
        connection.request("POST", TEXT, body, {"Content-Type": "application/json"})
        connection.getresponse().read(100)
        connection.close()
        after = server.ask(*asked[0])
        done = server.metric("generated_tokens_total")
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(server.ask, TEXT, NEVER_ENDS | {"max_tokens": 60})
            while server.metric("generated_tokens_total") < done + 2:
                time.sleep(0.01)
            # whichever rank is told, what runs is answered first
            server.processes[backend == "torch"].send_signal(signal.SIGTERM)
            status, answer = last.result(60)
        statuses, said = server.ends()
    assert statuses == [0, 0], said
    assert (status, answer["usage"]["completion_tokens"]) == (200, 60)
    assert hits >= len(asked)
    loaded = mlx_kvret.load("demo", backend=backend)
    with running(loaded, {"budget": 32}, {"max_tokens": 4096}, {"chunk": 2048}) as alone:
        for (path, body), one, two in zip(asked, first, again, strict=True):
            expected = alone.post(path, **body).json()
            assert one[0] == two[0] == 200, one
            assert plain(one[1]) == plain(expected)
            # what was gone of a snapshot went before
            assert plain(two[1])[:2] == plain(expected)[:2]
    assert after[1]["choices"] == first[0][1]["choices"]


@pytest.mark.parametrize("whom", [0, 1])
def test_a_rank_dies(whom: int, tmp_path: Path) -> None:
    """The other one ends within the limit and says why, whether or not anybody asks for anything."""
    with several(ring(2, tmp_path)) as server, ThreadPoolExecutor(1) as pool:
        if whom:
            asked = pool.submit(server.ask, TEXT, NEVER_ENDS)
            while server.metric("generated_tokens_total") < 2:
                time.sleep(0.01)
        server.processes[whom].kill()
        statuses, said = server.ends()
        if whom:
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                assert asked.result(60)[0] == 500
    assert statuses[1 - whom] == watch.STATUS, said
    assert "another rank is gone" in said[1 - whom]


def test_a_fault_of_the_first_rank_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: the others would wait for its next word, while the front answers 503."""
    service, _ = start(*mlx_kvret.load("demo", backend="mlx"), OPTIONS, SETTINGS, ROOM)
    worker, scheduler = service.worker, service.scheduler

    def fault() -> None:
        raise ZeroDivisionError("a fault")

    # as of a leader
    scheduler.beat = lambda: None
    monkeypatch.setattr(scheduler, "turn", fault)
    serving = Serving(service, lambda _: worker.wake())
    late = threading.Timer(20, serving.stop)
    late.start()
    with pytest.raises(RankLost, match="a fault"):
        serving.run_until_told()
    late.cancel()


def test_a_message_of_any_length():
    given = [list(range(n)) for n in (0, 1, WORDS, 3 * WORDS, 1000)] + [["ä", 1.5, None, {"a": [1]}]]

    def work(ranks: Any) -> Any:
        line = Line(ranks)
        found = [line.say(one if ranks.rank == 0 else None) for one in given]
        return found, line.heard(ranks.rank == 1, ranks.rank == 2)

    for found, heard in together(3, work):
        assert found == given
        assert heard == ([1], True)


def test_how_tokens_are_drawn_is_told_whole():
    drawing = Drawing(0.7, 0.9, 3, {5: 1.5, 7: -100.0}, 0.5, 0.25)
    assert drawing_of(json.loads(json.dumps(told_of(drawing)))) == drawing
