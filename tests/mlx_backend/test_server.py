"""mlx-lm's own server with an attached model answers as one request at a time would be answered alone."""

import json
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer

import pytest
from mlx_lm import server

import mlx_kvret
from mlx_kvret import demo

OPTIONS = {"budget": 16, "buffer": 8}
NAMES = ["Ada", "Anna", "Bruno", "Clara", "Frank", "Hugo", "Ivan", "Stella"]
COLOURS = ["amber", "black", "blue", "brown", "copper"]


@pytest.fixture(scope="module")
def base():
    """The address of a running server."""
    found, load = [], server.load

    def attached(*args, **kwargs):
        model, *rest = load(*args, **kwargs)
        return mlx_kvret.attach(model, demo.GATES, **OPTIONS), *rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "load", attached)
        patch.setattr(server, "_run_http_server", lambda host, port, generator: found.append(generator))
        arguments = ["--model", str(demo.MODEL), "--max-tokens", "4", "--log-level", "ERROR"]
        patch.setattr(sys, "argv", ["mlx_lm.server", *arguments])
        server.main()
        (generator,) = found
        try:
            http = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: server.APIHandler(generator, *args))
            thread = threading.Thread(target=http.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{http.server_port}/v1"
            http.shutdown()
            thread.join()
            http.server_close()
        finally:
            generator.stop_and_join()


@pytest.fixture(scope="module")
def alone():
    model, tokenizer = mlx_kvret.load("demo")
    return model, tokenizer, {}


def ask(base, prompt, **more):
    """Text, and how many tokens of the prompt were read before, of a completion."""
    body = json.dumps({"model": str(demo.MODEL), "prompt": prompt, "max_tokens": 4} | more).encode()
    request = urllib.request.Request(f"{base}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200
        answer = json.loads(response.read())
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def expected(alone, prompt):
    model, tokenizer, known = alone
    if prompt not in known:
        known[prompt] = mlx_kvret.generate(model, tokenizer, prompt, max_tokens=4, **OPTIONS)
    return known[prompt]


def prompts(count, shared):
    """Stories of 1 to 40 facts, alike at their beginning or not, and what is asked of them."""
    for i in range(count):
        facts = [
            f"remember {NAMES[(j + (0 if shared else i)) % 8]} {COLOURS[(3 * j + (0 if shared else i)) % 5]}"
            for j in range([1, 7, 40][i % 3])
        ]
        yield f"{' '.join(facts)} recall {NAMES[i % 8]}"


@pytest.mark.parametrize("shared", [True, False], ids=["alike", "apart"])
@pytest.mark.parametrize("clients", [1, 8])
def test_many_requests_are_answered_as_alone(base, alone, clients, shared):
    asked = list(prompts(50, shared))
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda prompt: ask(base, prompt)[0], asked))
    assert answers == [expected(alone, prompt) for prompt in asked]


def test_a_conversation_goes_on_from_the_cache_of_its_last_turn(base, alone):
    model, tokenizer, _ = alone
    turn = next(prompts(3, True))
    cache = mlx_kvret.make_cache(model, **OPTIONS)
    for fact in range(4):
        # cut, for the token that ends an answer is none of the next prompt
        text, cached = ask(base, turn, max_tokens=1)
        # the first turn may begin as another conversation did
        assert cached == cache.seen or fact == 0
        rest = tokenizer.encode(turn)[cache.seen :]
        assert text == mlx_kvret.generate(model, tokenizer, rest, cache=cache, max_tokens=1)
        turn += f" {text} remember {NAMES[fact]} {COLOURS[fact]} recall {NAMES[fact]}"


@pytest.mark.parametrize("more", [{"seed": 3}, {"stream": False, "temperature": 0.0}])
def test_other_requests_are_served_too(base, alone, more):
    prompt = next(prompts(1, True))
    assert ask(base, prompt, **more)[0] == expected(alone, prompt)
