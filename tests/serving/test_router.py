"""Servers behind a real nginx, with the configuration that the documentation gives."""

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mlx_kvret

from .running import CHAT, TEXT, Running, command, facts, running, user

CONFIGURATION = (Path(__file__).parents[2] / "examples/nginx.conf").read_text(encoding="utf-8")
# Debian's, which is not in the path of everyone
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx; on Debian: apt-get install nginx")
# the token that ends answers, banned
ENDLESS = {"logit_bias": {"1": -100}}


class Router:
    """nginx in front of two servers."""

    # waits and asks as a server's clients do
    ask, post, until = Running.ask, Running.post, Running.until

    def __init__(self, port, log):
        self.port, self.log, self.seen = port, log, 0

    def routed(self, count):
        """Status and servers of the ``count`` requests since the last time, in the order of their ends."""

        def lines():
            return self.log.read_text().splitlines()[self.seen :]

        self.until(lambda: len(lines()) >= count)
        found = lines()
        assert len(found) == count, found
        self.seen += count
        return [
            (
                int(status),
                [int(address.rpartition(":")[2]) for address in servers.split(", ") if address != "-"],
            )
            for _, status, servers in (line.split(" ", 2) for line in found)
            for servers in [servers.rsplit(" ", 3)[0]]
        ]

    def turn(self, name, *messages, **body):
        """One turn of a conversation: text, tokens of the prompt, and those that a snapshot had read."""
        body = {"messages": list(messages), "max_tokens": 4} | ENDLESS | body
        headers = {"Content_Type": "application/json", "X_Conversation": name}
        answer = self.ask("POST", CHAT, json.dumps(body), **headers)
        assert answer.status == 200, answer.text
        found = answer.json()
        usage = found["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return found["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


@contextlib.contextmanager
def streamed(router, body, name=""):
    """The response of a completion that is a stream."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", router.port, timeout=20)) as connection:
        headers = {"Content-Type": "application/json", "X-Conversation": name}
        connection.request("POST", TEXT, json.dumps(body), headers)
        with connection.getresponse() as answer:
            yield answer


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def routing(folder, ports, **changes):
    """The example's configuration with ports of its own, and where it says ``changes``."""
    port, text = free_port(), CONFIGURATION
    for stock, own in zip(("8080", "8081", "8082"), (port, *ports), strict=True):
        assert text.count(f"127.0.0.1:{stock}") == 1
        text = text.replace(f"127.0.0.1:{stock}", f"127.0.0.1:{own}")
    for stock, own in changes.items():
        assert stock in text
        text = text.replace(stock, own)
    (folder / "nginx.conf").write_text(text, encoding="utf-8")
    # as root its worker would be another user, who may not write here
    own = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
    line = [NGINX, "-e", "stderr", "-p", f"{folder}/", "-c", "nginx.conf", "-g", own]
    with (folder / "errors").open("w") as errors, subprocess.Popen(line, stderr=errors) as process:
        try:
            router = Router(port, folder / "nginx.log")

            def listens():
                assert process.poll() is None, (folder / "errors").read_text()
                with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                    return True

            router.until(listens)
            yield router
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def two_models():
    return [mlx_kvret.load("demo", backend="torch") for _ in range(2)]


@pytest.fixture
def servers(two_models):
    with running(two_models[0]) as first, running(two_models[1]) as second:
        yield first, second


@pytest.fixture
def router(servers, tmp_path):
    with routing(tmp_path, [server.port for server in servers]) as made:
        yield made


def names(router):
    """Three conversations' names by the port of their server."""
    found = {}
    for i in range(100):
        router.ask("GET", "/health", X_Conversation=f"talk {i}")
        ((_, (port,)),) = router.routed(1)
        found.setdefault(port, []).append(f"talk {i}")
    assert len(found) == 2 and min(map(len, found.values())) > 20
    return {port: those[:3] for port, those in found.items()}


def begun(router, named):
    """The first turns of conversations: what was said, its tokens, and the server of each."""
    said = {}
    for i, name in enumerate(itertools.chain(*named)):
        asked = user(facts(9, i))
        text, tokens, cached = router.turn(name, *asked, cache_salt=name)
        assert cached == 0
        ((_, (port,)),) = router.routed(1)
        said[name] = [*asked, {"role": "assistant", "content": text}], tokens, port
    return said


def go_on(router, name, messages):
    """The second turn: its text, how many of its tokens were known, and the servers asked for it."""
    text, _, cached = router.turn(name, *messages, *user("recall Clara"), cache_salt=name)
    ((_, ports),) = router.routed(1)
    return text, cached, ports


def test_a_conversation_goes_to_the_server_that_has_read_it(servers, router):
    said = begun(router, names(router).values())
    assert {port for *_, port in said.values()} == {server.port for server in servers}
    for name, (messages, tokens, port) in said.items():
        _, cached, ports = go_on(router, name, messages)
        assert ports == [port] and cached >= tokens


def test_a_router_that_spreads_evenly_reads_everything_again(servers, tmp_path):
    ports = [server.port for server in servers]
    with routing(tmp_path, ports, **{"hash $conversation consistent;": ""}) as router:
        # an odd number, so that every second turn comes to the other server
        for name, (messages, _, port) in begun(router, "abc").items():
            _, cached, ports = go_on(router, name, messages)
            assert ports != [port] and cached == 0


def test_clients_that_send_no_name_are_told_apart_by_their_keys(router):
    found = {}
    for key in [f"key {i}" for i in range(40)] * 2:
        assert router.ask("GET", "/v1/models", Authorization=f"Bearer {key}").status == 200
        found.setdefault(key, set()).add(router.routed(1)[0][1][0])
    assert {len(ports) for ports in found.values()} == {1}
    assert len(set.union(*found.values())) == 2


def test_a_server_that_stopped_is_passed_over_until_it_is_back(two_models, tmp_path):
    with running(two_models[0]) as first, contextlib.ExitStack() as stack:
        second = stack.enter_context(running(two_models[1]))
        gone = second.port
        with routing(tmp_path, [first.port, gone]) as router:
            said = begun(router, names(router).values())
            stack.close()
            moved = [name for name, (*_, port) in said.items() if port == gone]
            texts = {}
            for name, (messages, tokens, port) in said.items():
                texts[name], cached, ports = go_on(router, name, messages)
                # only the conversations of the server that has gone move, and are read anew
                assert cached == 0 if port == gone else cached >= tokens
                assert ports[-1] == first.port
            # the same again is known where they went
            for name in moved:
                messages, tokens, _ = said[name]
                text, cached, _ = go_on(router, name, messages)
                assert text == texts[name] and cached > tokens
            with running(two_models[1], settings={"port": gone}):
                assert go_on(router, moved[0], said[moved[0]][0]) == (texts[moved[0]], 0, [gone])


def test_a_stream_comes_token_by_token(servers, router, monkeypatch):
    gate = threading.Event()
    for server in servers:
        stock, count = server.scheduler.engine.step, []

        def step(stock=stock, count=count, server=server):
            count.append(1)
            assert len(count) < 4 or gate.wait(20)
            return stock()

        monkeypatch.setattr(server.scheduler.engine, "step", step)
    with streamed(router, {"prompt": "the weary", "max_tokens": 40, "stream": True} | ENDLESS) as answer:
        try:
            # the servers wait, and what they have sent is here, though it is too little to fill a packet
            read = b"".join(answer.readline() for _ in range(4))
            assert read.count(b"data: ") == 2 and len(read) < 1000
            assert answer.headers["Content-Type"].startswith("text/event-stream")
        finally:
            gate.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_a_client_that_leaves_is_noticed_behind_the_router(servers, router):
    with streamed(router, {"prompt": "the weary", "max_tokens": 200, "stream": True} | ENDLESS) as answer:
        answer.readline()
    router.until(lambda: all(server.idle for server in servers))
    assert 0 < sum(server.metrics.generated for server in servers) < 190


def test_a_busy_server_is_not_left_for_another(two_models, tmp_path):
    settings, room = {"queue": 0, "max_tokens": 10**5, "drain": 0.1}, {"rows": 1}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(model, settings=settings, room=room)) for model in two_models]
        router = stack.enter_context(routing(tmp_path, [server.port for server in servers]))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        body = json.dumps({"prompt": "the weary", "max_tokens": 10**5} | ENDLESS)
        headers = {"Content_Type": "application/json", "X_Conversation": "one"}
        first = pool.submit(router.ask, "POST", TEXT, body, **headers)
        router.until(lambda: any(server.metrics.generated for server in servers))
        (busy,) = (server for server in servers if server.metrics.generated)
        answer = router.ask("POST", TEXT, body, **headers)
        assert answer.status == 429 and int(answer.headers["Retry-After"]) > 0
        assert router.routed(1) == [(429, [busy.port])]
        busy.stop()
        assert first.result().status == 503
        # the one that stops does not hand on what it had begun to answer
        assert router.routed(1) == [(503, [busy.port])]


def test_what_servers_refuse_is_refused_behind_the_router(servers, router):
    body = json.dumps({"prompt": "the", "max_tokens": 1})
    own = f"http://127.0.0.1:{router.port}"
    json_type = {"Content_Type": "application/json"}
    assert router.ask("GET", "/").status == 200
    assert router.ask("POST", TEXT, body, **json_type, Origin=own).status == 200
    foreign = router.ask("POST", TEXT, body, **json_type, Origin="http://other.example")
    assert foreign.status == 403 and foreign.json()["error"]["code"] == "origin_not_allowed"
    named = router.ask("POST", TEXT, body, **json_type, Host="other.example")
    assert named.status == 403 and named.json()["error"]["code"] == "host_not_allowed"
    # goes through a file of the router's
    long = router.ask("POST", TEXT, json.dumps({"prompt": "the " * 5_000, "max_tokens": 1}), **json_type)
    assert long.status == 200 and long.json()["usage"]["prompt_tokens"] >= 5_000
    router.routed(5)
    # a head that promises more than servers take is answered by the router, which asks none
    large = router.ask("POST", TEXT, None, **json_type, Content_Length=str((32 << 20) + 1))
    assert large.status == 413 and large.json()["error"]["code"] == "body_too_large"
    assert router.routed(1) == [(413, [])]


def test_refusals_amid_a_long_body_come_through(router):
    for i in range(6):
        refused = router.ask(
            "POST", TEXT, b" " * (10 << 20), Content_Type="text/plain", X_Conversation=str(i)
        )
        assert refused.status == 415
    for i in range(6):
        assert router.ask("GET", "/v1/models", X_Conversation=str(i)).status == 200


def test_a_process_that_dies_with_requests_in_hand(two_models, tmp_path):
    with command("--budget", "32") as (process, _, address), running(two_models[0]) as left:
        port = int(address.rpartition(":")[2])
        with routing(tmp_path, [port, left.port]) as router, ThreadPoolExecutor(1) as pool:
            name = names(router)[port][0]
            asked = user(f"remember Stella salmon {facts(9)} recall Stella")
            assert router.turn(name, *asked, logit_bias={})[0] == "salmon"
            assert router.routed(1) == [(200, [port])]
            body = {"prompt": "the weary", "max_tokens": 4000, "stream": True} | ENDLESS
            with streamed(router, body, name) as answer:
                assert answer.readline().startswith(b"data: ")
                # it takes a request and does nothing more
                process.send_signal(signal.SIGSTOP)
                later = pool.submit(router.turn, name, *asked, logit_bias={})
                time.sleep(0.3)
                assert not later.done()
                process.kill()
                text, _, cached = later.result()
                assert (text, cached) == ("salmon", 0)
                # what has begun cannot go on elsewhere, and does not look whole
                with pytest.raises(http.client.IncompleteRead):
                    answer.read()
            assert sorted(router.routed(2), key=str) == [(200, [port, left.port]), (200, [port])]
