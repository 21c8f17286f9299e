"""Careless and hostile clients: the right status, and the next request is answered."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .running import CHAT, TEXT, request, running, user


@pytest.fixture(scope="module")
def server(demo_mlx):
    with running(demo_mlx, settings={"head_time": 1.0, "body_time": 1.0}) as made:
        yield made


@pytest.fixture(autouse=True)
def next_is_answered(server):
    """Whatever the test did."""
    yield
    assert server.text("remember Ada amber recall Ada", max_tokens=1) == "amber"
    assert server.ask("GET", "/health").json()["status"] == "ok"
    server.until(lambda: server.idle)


def status(answer):
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def chat(**more):
    return json.dumps({"messages": user("Edgar"), "max_tokens": 2} | more).encode()


def head(*lines, host="127.0.0.1", path=CHAT):
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


JSON = "Content-Type: application/json"
RAW = {
    "negative length": (head(JSON, "Content-Length: -1"), 400),
    "huge length": (head(JSON, "Content-Length: 100000000000") + b"{}", 413),
    "endless length": (head(JSON, f"Content-Length: 1{'0' * 30}"), 400),
    "no number": (head(JSON, "Content-Length: ten"), 400),
    "two lengths": (head(JSON, "Content-Length: 2", "Content-Length: 3") + b"{}", 400),
    "no HTTP": (b"hello\r\n\r\n", 400),
    "bad UTF-8": (request(CHAT, b"\xff\xfe"), 400),
    "text/plain": (request(CHAT, chat(), "Content-Type: text/plain"), 415),
    "no type": (request(CHAT, chat(), "X-Nothing: 1"), 415),
    "form": (request(CHAT, b"a=1", "Content-Type: application/x-www-form-urlencoded"), 415),
    "foreign page": (request(CHAT, chat(), JSON, "Origin: http://evil.example"), 403),
    "page of null": (request(CHAT, chat(), JSON, "Origin: null"), 403),
    "another name": (request(CHAT, chat(), host="evil.example"), 403),
    "another name with a port": (request(CHAT, chat(), host="evil.example:8080"), 403),
    "two names": (request(CHAT, chat(), JSON, "Host: evil.example"), 400),
    "large head": (head(JSON, f"X-Long: {'a' * 200_000}"), 400),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), RAW.values(), ids=RAW)
def test_raw_requests(server, data, expected):
    assert status(server.raw(data)) == expected


BODIES = {
    "no messages": ({"messages": None}, 400),
    "stop 5": ({"stop": 5}, 400),
    "empty stop": ({"stop": [""]}, 400),
    "bias out of range": ({"logit_bias": {"99999999": 1}}, 400),
    "bias that is no token": ({"logit_bias": {"-1": 1}}, 400),
    "bias with a long number": ({"logit_bias": {"9" * 5000: 1}}, 400),
    "two answers": ({"n": 2}, 400),
    "max_tokens": ({"max_tokens": 10**9}, 400),
    "another model": ({"model": "../../etc"}, 404),
    "template arguments": ({"chat_template_kwargs": {"tokenize": True}}, 400),
    "an unknown variable": ({"chat_template_kwargs": {"nothing": True}}, 400),
    "tools that the template drops": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400),
    "image": ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]}, 400),
}  # fmt: skip


@pytest.mark.parametrize(("more", "expected"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_bodies(server, more, expected, stream):
    answer = server.post(CHAT, **({"messages": user("Edgar"), "max_tokens": 2, "stream": stream} | more))
    assert answer.status == expected
    error = answer.json()["error"]
    assert (
        error["message"] and error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[expected]
    )


@pytest.mark.parametrize("prompt", ["", [], [10**9], [-1], "a" * 10 + "\0"])
def test_prompts_of_nothing_or_of_unknown_tokens(server, prompt):
    answer = server.post(TEXT, prompt=prompt, max_tokens=1)
    assert answer.status == (200 if prompt and isinstance(prompt, str) else 400)


def test_a_prompt_may_be_too_long(demo_mlx):
    with running(demo_mlx, settings={"max_prompt": 20}) as server:
        assert server.text([5] * 20, max_tokens=1)
        for path, body in ((TEXT, {"prompt": [5] * 21}), (CHAT, {"messages": user("Ada " * 20)})):
            answer = server.post(path, **body)
            assert answer.status == 400 and "21 tokens" in answer.json()["error"]["message"]


def test_large_bodies_come_a_few_at_a_time(server):
    body = json.dumps({"prompt": "Ada " + " " * 2**21, "max_tokens": 1}).encode()
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: status(server.raw(request(TEXT, body), 60)), range(12)))
    assert found == [200] * 12


def test_requests_may_come_before_the_last_answer(server):
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(20)
        asked = {"prompt": "the weary", "max_tokens": 150, "logit_bias": {"1": -100}}
        client.sendall(one + request(TEXT, json.dumps(asked).encode()))
        out = b""
        while part := client.recv(65536):
            out += part
    assert out.count(b"HTTP/1.1 200") == 2 and b'"completion_tokens":150' in out


def test_a_url_is_never_fetched(server):
    with socket.create_server(("127.0.0.1", 0)) as inner:
        inner.settimeout(0.5)
        url = f"http://127.0.0.1:{inner.getsockname()[1]}/admin"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        assert server.post(CHAT, messages=[{"role": "user", "content": content}]).status == 400
        with pytest.raises(TimeoutError):
            inner.accept()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_33_megabytes(server, chunked):
    part, parts = b" " * 2**20, 33
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(20)
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {parts * len(part)}"
        client.sendall(head(JSON, length))
        try:
            for _ in range(parts):
                client.sendall(b"100000\r\n" + part + b"\r\n" if chunked else part)
        except OSError:
            pass
        answer = client.recv(100)
    assert status(answer) == 413


def test_a_head_that_comes_slowly_is_cut_off(server):
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(10)
        for byte in head(JSON, "X-Slow: yes"):
            try:
                client.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        with pytest.raises((ConnectionError, AssertionError)):
            assert client.recv(100)
    assert time.monotonic() - begun < 8


def test_a_second_request_on_a_connection_may_not_come_slowly_either(server):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(10)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(4096)
        assert status(answer) == 200
        client.sendall(b"GET /health HT")
        begun = time.monotonic()
        assert client.recv(100) == b"" and time.monotonic() - begun < 5


def test_a_body_that_comes_slowly_is_refused(server):
    begun = time.monotonic()
    answer = server.raw(head(JSON, "Content-Length: 100") + b"{")
    assert status(answer) == 408 and time.monotonic() - begun < 8


def test_many_idle_connections_hold_nobody_up(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    assert server.text("remember Ada amber recall Ada", max_tokens=1) == "amber"
    for client in idle:
        client.close()


def test_paths_and_methods(server):
    assert server.ask("GET", "/nothing").status == 404
    assert server.ask("GET", CHAT).status == 405
    assert server.ask("GET", "/v1/models/../../etc/passwd").status == 404
    assert server.post("/v1/models").status == 405
    for path in ("/health", "/metrics", "/v1/models"):
        assert server.ask("GET", path).status == 200


def test_no_page_may_read_what_it_does_not_come_from(server):
    answer = server.ask("OPTIONS", CHAT, Origin="http://evil.example", Access_Control_Request_Method="POST")
    assert answer.status == 403
    own = server.ask("GET", "/v1/models", Origin=f"http://127.0.0.1:{server.port}")
    assert own.status == 200 and "Access-Control-Allow-Origin" not in own.headers


def test_a_named_page_may_and_a_key_is_asked_for(demo_mlx):
    page = "https://page.example"
    with running(demo_mlx, settings={"origins": (page,), "api_key": "secret"}) as server:
        answer = server.ask("OPTIONS", CHAT, Origin=page, Access_Control_Request_Method="POST")
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, page)
        for header, expected in ((None, 401), ("Bearer wrong", 401), ("secret", 401), ("Bearer secret", 200)):
            given = {"Authorization": header} if header else {}
            answer = server.ask("POST", CHAT, chat(), Content_Type="application/json", Origin=page, **given)
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (expected, page)
        assert server.ask("GET", "/health").status == 200
        assert server.ask("GET", "/metrics").status == server.ask("GET", "/v1/models").status == 401


def test_requests_at_once_beyond_the_queue_are_told_to_come_back(demo_mlx):
    with running(demo_mlx, settings={"queue": 2}, room={"rows": 1}) as server:
        answers = []

        def ask():
            answers.append(server.post(TEXT, prompt="the weary", max_tokens=100, logit_bias={"1": -100}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [answer.status for answer in answers]
        assert set(found) == {200, 429} and found.count(200) >= 3
        full = next(answer for answer in answers if answer.status == 429)
        assert int(full.headers["Retry-After"]) >= 1 and full.json()["error"]["code"] == "queue_full"
        assert server.text("remember Ada amber recall Ada", max_tokens=1) == "amber"
