"""Clients that leave, a server that stops, a thread that fails: nobody waits for ever, nothing is left."""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from .running import CHAT, TEXT, command, facts, request, running, user

# the token that ends answers, banned
ENDLESS = {"logit_bias": {"1": -100}}


def left(server, body, wait):
    """A client that goes away after ``wait`` bytes of the answer, or at once."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request(CHAT, json.dumps(body).encode()))
        if wait:
            client.recv(wait)
        else:
            server.until(lambda: not server.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_noticed_within_a_step(server, stream):
    before = server.metrics.generated
    body = {"messages": user(facts(5)), "max_tokens": 200, "stream": stream} | ENDLESS
    left(server, body, 10 if stream else 0)
    server.until(lambda: server.idle)
    assert server.metrics.generated - before < 150


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read(server, stream):
    before = server.metrics.prompt_tokens
    body = {"messages": user(facts(2000)), "max_tokens": 5, "stream": stream}
    left(server, body, 0)
    server.until(lambda: server.idle)
    assert server.metrics.prompt_tokens >= before


def test_a_client_that_reads_nothing_is_let_go(demo_mlx):
    with running(demo_mlx, settings={"write_time": 0.5, "max_tokens": 100_000}) as server:
        body = {"prompt": "the", "max_tokens": 100_000, "stream": True, "logprobs": 20} | ENDLESS
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(request(TEXT, json.dumps(body).encode()))
            server.until(lambda: not server.idle)
            server.until(lambda: server.idle, 60)
        assert server.metrics.generated < 100_000


def test_answers_under_load_are_those_of_single_requests(server):
    prompts = [f"remember Stella salmon {facts(3 + 17 * i, i)} recall Stella" for i in range(8)]
    options = {"max_tokens": 12} | ENDLESS
    expected = [server.text(prompt, **options, cache_salt="alone") for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: server.text(prompt, **options, cache_salt="load"), prompts))
    assert found == expected and all(text.startswith("salmon") for text in found[:2])


def test_a_step_that_fails_is_told_and_the_server_goes_on(server, monkeypatch):
    stock, failing = server.scheduler.engine.step, threading.Event()

    def step():
        if failing.is_set():
            raise MemoryError("no more")
        return stock()

    monkeypatch.setattr(server.scheduler.engine, "step", step)
    failing.set()
    whole = server.post(CHAT, messages=user("the"), max_tokens=5)
    streamed = server.post(CHAT, messages=user("the"), max_tokens=5, stream=True)
    failing.clear()
    # nothing had been sent yet, so the stream has a status too
    for answer in (whole, streamed):
        assert answer.status == 500 and "MemoryError" in answer.json()["error"]["message"]
    health = server.ask("GET", "/health").json()
    assert health["status"] == "ok" and health["failed_steps"] >= 2
    assert server.text("remember Ada amber recall Ada", max_tokens=1) == "amber"


def test_a_stream_that_fails_says_so_and_has_no_done(server, monkeypatch):
    stock, count = server.scheduler.engine.step, []

    def step():
        count.append(1)
        if len(count) == 5:
            raise RuntimeError("broken")
        return stock()

    monkeypatch.setattr(server.scheduler.engine, "step", step)
    answer = server.post(CHAT, messages=user("the"), max_tokens=50, stream=True, **ENDLESS)
    assert answer.status == 200 and "[DONE]" not in answer.text
    last = json.loads(answer.text.strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "step_failed"


def test_a_thread_that_ends_leaves_nobody_waiting(demo_mlx, monkeypatch):
    with running(demo_mlx) as server:
        monkeypatch.setattr(server.scheduler, "turn", lambda: 1 / 0)
        answer = server.post(CHAT, messages=user("the"))
        assert answer.status == 500
        server.worker.join(10)
        assert server.ask("GET", "/health").status == 503
        assert server.post(CHAT, messages=user("the")).status == 503


def test_a_request_that_takes_too_long_is_ended(demo_mlx):
    with running(demo_mlx, settings={"timeout": 0.2, "max_tokens": 100_000}) as server:
        answer = server.post(TEXT, prompt="the", max_tokens=100_000, **ENDLESS)
        assert answer.status == 504 and "0.2 s" in answer.json()["error"]["message"]
        server.until(lambda: server.idle)


def test_stopping_lets_running_requests_end_and_takes_no_new_ones(demo_mlx):
    with running(demo_mlx) as server, ThreadPoolExecutor(2) as pool:
        asked = {"prompt": "the weary", "max_tokens": 150, "stream": True} | ENDLESS
        running_one = pool.submit(server.post, TEXT, **asked)
        server.until(lambda: server.metrics.generated > 3)
        server.serving.stop()
        answer = running_one.result()
        assert answer.events()[-1]["choices"][0]["finish_reason"] == "length"
        server.thread.join(20)
        with pytest.raises(ConnectionError):
            server.post(TEXT, prompt="the")


def test_stopping_ends_what_takes_longer_than_it_may(demo_mlx):
    settings = {"drain": 0.3, "max_tokens": 10**6}
    with running(demo_mlx, settings=settings) as server, ThreadPoolExecutor(2) as pool:
        asked = {"prompt": "the weary", "max_tokens": 10**6} | ENDLESS
        streamed = pool.submit(server.post, TEXT, **asked, stream=True)
        whole = pool.submit(server.post, TEXT, **asked)
        server.until(lambda: server.metrics.generated > 20)
        begun = time.monotonic()
        server.serving.stop()
        assert whole.result().status == 503
        assert '"code":"stopping"' in streamed.result().text
        server.thread.join(20)
        assert time.monotonic() - begun < 8


# ------------------------------------------------------------------------------- the command, as a process


def ask(address, path, **body):
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_with_0(number, tmp_path):
    arguments = ["--budget", "64", "--backend", "mlx", "--prompt-cache-dir", str(tmp_path)]
    with command(*arguments) as (process, said, address):
        assert "16 conversations of 0.1 MB at once" in said[0] and "at most" in said[0]
        answer = ask(address, TEXT, prompt=f"remember Stella salmon {facts(9)} recall Stella")
        assert answer["choices"][0]["text"] == "salmon" and answer["model"] == "demo"
        with ThreadPoolExecutor(1) as pool:
            asked = {"prompt": "the weary", "max_tokens": 100} | ENDLESS
            later = pool.submit(ask, address, TEXT, **asked)
            time.sleep(0.5)
            process.send_signal(number)
            assert later.result()["usage"]["completion_tokens"] == 100
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert len(list(tmp_path.glob("*.kvret"))) >= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "give --api-key"),
        (["--memory", "10KB"], "give at least"),
        (["--memory", "8"], "expected a size"),
        (["--policy", "full"], "bounds nothing"),
        (["--prompt-cache-disk", "1GB"], "no effect without"),
        (["--rows", "0"], "rows is 0"),
        (["--budget", "0"], "budget is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line_and_a_status(arguments, said):
    code = "from mlx_kvret.cli import main; main()"
    given = ["serve", "--model", "demo", "--port", "0", *arguments]
    found = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1 and found.stdout == ""
    assert said in found.stderr and found.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told(demo_mlx):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = "from mlx_kvret.cli import main; main()"
        given = ["serve", "--model", "demo", "--memory", "20MB", "--budget", "64", "--port", port]
        found = subprocess.run(
            [sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 1 and f"cannot listen on 127.0.0.1 port {port}" in found.stderr


# ------------------------------------------------------------------------------------------- come and go


def test_clients_that_come_stream_drop_and_return(server):
    """Ten seconds of it: no 5xx, no thread and no request left, memory where it was."""
    drawn, statuses, end = random.Random(0), [], time.monotonic() + 10

    def once(seed):
        own = random.Random(seed)
        text = facts(own.randrange(1, 60), own.randrange(5))
        body = {"messages": user(text), "max_tokens": own.randrange(1, 20), "stream": own.random() < 0.6}
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.settimeout(60)
            client.sendall(request(CHAT, json.dumps(body).encode()))
            if own.random() < 0.4:
                time.sleep(own.random() / 2)
                return
            out = b""
            while part := client.recv(65536):
                out += part
            statuses.append(int(out[9:12]))
            assert b"[DONE]" in out or b'"finish_reason"' in out or statuses[-1] == 429

    once(0)
    server.until(lambda: server.idle)
    threads = threading.active_count()
    with ThreadPoolExecutor(12) as pool:
        while time.monotonic() < end:
            list(pool.map(once, [drawn.randrange(10**9) for _ in range(24)]))
    server.until(lambda: server.idle)
    assert len(statuses) > 20 and set(statuses) <= {200, 429}
    server.until(lambda: threading.active_count() <= threads + 1)
    assert server.scheduler.prefixes.nbytes <= server.plan.snapshots
