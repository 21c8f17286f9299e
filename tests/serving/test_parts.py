"""What needs no model: stops, draws, snapshots' names and their order, admission, what is refused."""

import json
import random
import string
from dataclasses import dataclass

import numpy as np
import pytest

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.errors import ConfigError
from mlx_kvret.serving.admission import plan
from mlx_kvret.serving.drawing import Drawer, Drawing
from mlx_kvret.serving.failures import Refusal
from mlx_kvret.serving.metrics import Metrics, exposition
from mlx_kvret.serving.prefixes import Prefix, Prefixes
from mlx_kvret.serving.requests import ChatRequest, CompletionRequest, parsed
from mlx_kvret.serving.settings import Settings
from mlx_kvret.serving.stops import Stops

# ------------------------------------------------------------------------------------------------- stops


def test_stops_are_found_wherever_tokens_are_cut():
    drawn = random.Random(0)
    for _ in range(500):
        text = "".join(drawn.choices("abc", k=30))
        stops = ["".join(drawn.choices("abc", k=drawn.randrange(1, 6))) for _ in range(drawn.randrange(1, 4))]
        found, out, stopped, place = Stops(stops), "", False, 0
        while place < len(text) and not stopped:
            size = drawn.randrange(1, 5)
            more, stopped = found.add(text[place : place + size])
            out, place = out + more, place + size
        if not stopped:
            out += found.end()
        seen = text[:place]
        places = [seen.find(stop) for stop in stops if stop in seen]
        assert stopped == bool(places)
        assert out == seen[: min(places, default=len(seen))]


def test_no_more_is_held_back_than_may_be_a_stop():
    found = Stops(["</end>"])
    assert found.add("abc</en") == ("abc", False)
    assert found.add("x") == ("</enx", False)
    assert found.end() == ""


# ------------------------------------------------------------------------------------------------- draws


def logprobs(*shares):
    return np.log(np.array(shares, np.float32))


def test_draws_follow_the_shares():
    draw = Drawer(Drawing(1.0, seed=1))
    drawn = np.bincount([draw(logprobs(0.5, 0.3, 0.2)) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(drawn - [0.5, 0.3, 0.2]).max() < 0.03


def test_top_p_leaves_the_likeliest_that_reach_it():
    draw = Drawer(Drawing(1.0, 0.6, seed=1))
    assert {draw(logprobs(0.2, 0.5, 0.3)) for _ in range(200)} == {1, 2}
    draw = Drawer(Drawing(1.0, 0.001, seed=1))
    assert {draw(logprobs(0.2, 0.5, 0.3)) for _ in range(50)} == {1}


def test_penalties_and_bias():
    shares = logprobs(0.5, 0.3, 0.2)
    draw = Drawer(Drawing(presence=1.0))
    assert [draw(shares) for _ in range(3)] == [0, 1, 2]
    draw = Drawer(Drawing(frequency=0.3))
    assert [draw(shares) for _ in range(5)] == [0, 0, 1, 0, 1]
    assert Drawer(Drawing(bias={2: 5.0}))(shares) == 2
    # impossible tokens stay impossible at any temperature
    draw = Drawer(Drawing(2.0, seed=0))
    assert {draw(logprobs(1.0, 1e-38, 1e-38)) for _ in range(100)} == {0}


def test_a_seed_is_a_row_s_own():
    def drawn(seed):
        draw = Drawer(Drawing(1.0, seed=seed))
        return [draw(logprobs(*[1 / 8] * 8)) for _ in range(20)]

    assert drawn(5) == drawn(5) != drawn(6)
    assert drawn(-1) == drawn(-1)


# -------------------------------------------------------------------------------------------- snapshots


@dataclass(eq=False)
class Cache:
    nbytes: int


def prefixes(limit, beside=None):
    return Prefixes(limit, lambda cache: Cache(cache.nbytes), beside)


def test_the_longest_snapshot_is_found():
    ids = list(range(100))
    prefix, kept = Prefix(("a",), ids), prefixes(1000)
    for length in (10, 40, 70):
        kept.put(prefix.key(length), lambda: Cache(1))
    kept.put(Prefix(("a",), [0, *ids]).key(60), lambda: Cache(1))
    assert [kept.longest(prefix, most) for most in (9, 10, 69, 99)] == [
        None, prefix.key(10), prefix.key(40), prefix.key(70)
    ]  # fmt: skip
    assert kept.longest(Prefix(("b",), ids), 99) is None
    assert kept.longest(Prefix(("a",), ids[:40] + [1] * 60), 99) == prefix.key(40)


def test_keys_are_the_same_however_they_are_made():
    ids = [random.Random(0).randrange(2**31) for _ in range(50)]
    prefix = Prefix(("a", "ü"), ids)
    assert list(prefix.keys([1, 7, 50])) == [prefix.key(n) for n in (1, 7, 50)]
    assert Prefix(("a", "ü"), ids[:7]).key(7) == prefix.key(7) == prefix.longer(ids[:9]).key(7)
    assert len({Prefix(owner, ids).key(5) for owner in (("a", "b"), ("ab",), ("ab", ""), ("", "ab"))}) == 4


class Beside(dict):
    def lengths(self):
        return [key.length for key in self]

    def put(self, key, cache, wait=False):
        self[key] = cache

    def close(self):
        self.closed = True


def test_the_least_recently_used_goes_first_and_what_is_pinned_last():
    keys = list(Prefix((), list(range(9))).keys(range(1, 10)))
    beside = Beside()
    kept = prefixes(50, beside)
    for key in keys[:5]:
        kept.put(key, lambda: Cache(10), pinned=key is keys[0])
    kept.get(keys[1])
    kept.put(keys[5], lambda: Cache(20))
    assert list(beside) == [keys[2], keys[3]] and kept.nbytes == 50
    kept.put(keys[6], lambda: Cache(50))
    assert list(beside) == [keys[2], keys[3], keys[4], keys[1], keys[5], keys[0]]
    kept.put(keys[7], lambda: Cache(51))
    assert len(kept) == 1 and kept.nbytes == 50
    kept.close()
    assert keys[6] in beside and beside.closed and kept.nbytes == 0
    assert kept.longest(Prefix((), list(range(9))), 9) == keys[6]


def test_a_copy_is_made_only_of_what_is_new():
    key, made = Prefix((), [1]).key(1), []
    kept = prefixes(50)
    for _ in range(3):
        kept.put(key, lambda: made.append(1) or Cache(1))
    assert len(made) == 1 and kept.nbytes == 1
    prefixes(0).put(key, lambda: 1 / 0)


# -------------------------------------------------------------------------------------------- admission

SHAPE = CacheShape(36, 8, 128, 128, 2, 2560)


def test_how_many_fit_is_arithmetic():
    config = EvictionConfig.create(1024)
    found = plan(SHAPE, config, 2048, 8 * 10**9, 100)
    assert found.row == SHAPE.nbytes(1024, 128) and found.reading == SHAPE.full_nbytes(2048)
    assert found.total <= 8 * 10**9 < found.total + 2 * found.row
    assert found.slabs == found.rows * 9 // 8
    assert plan(SHAPE, config, 2048, 8 * 10**9, 5).rows == 5
    assert plan(SHAPE, config, 2048, 8 * 10**9, 100, snapshots=0).rows > found.rows


def test_rows_in_few_bits_are_more():
    plain, few = (plan(SHAPE, EvictionConfig.create(1024, kv_bits=b), 2048, 8 * 10**9, 900) for b in (16, 4))
    assert few.row == SHAPE.nbytes(1024, 128, 4) and few.rows > 2 * plain.rows


def test_snapshots_that_could_hold_none_are_refused():
    config = EvictionConfig.create(1024)
    with pytest.raises(ConfigError, match="0B"):
        plan(SHAPE, config, 2048, 8 * 10**9, 8, snapshots=SHAPE.nbytes(1024, 128))


@pytest.mark.parametrize("snapshots", [None, 0, 10**9])
def test_what_would_do_is_said(snapshots):
    config = EvictionConfig.create(1024)
    with pytest.raises(ConfigError) as found:
        plan(SHAPE, config, 2048, 10**6, 8, snapshots)
    least = int(str(found.value).partition("at least ")[2].split()[0].replace(",", ""))
    assert plan(SHAPE, config, 2048, least, 8, snapshots).rows == 1
    with pytest.raises(ConfigError):
        plan(SHAPE, config, 2048, least - 2, 8, snapshots)


# ------------------------------------------------------------------------------------------ what is asked

CHAT = {"messages": [{"role": "user", "content": "a"}]}
WRONG_CHATS = [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "abc"}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages"),
    *((CHAT | {name: value}, name) for name, value in [
        ("stop", 5), ("stop", [1]), ("stop", [""]), ("stop", ["a"] * 17), ("n", 2), ("n", 0), ("seed", 2**63),
        ("seed", "1"), ("temperature", "2"), ("temperature", 2.1), ("temperature", True), ("top_p", 0),
        ("top_p", 1.5), ("max_tokens", 0), ("max_tokens", 1.5), ("max_completion_tokens", -1),
        ("logit_bias", {"1": 101}), ("logit_bias", [1]), ("presence_penalty", 3), ("logprobs", 1),
        ("top_logprobs", 2), ("stream", "yes"), ("stream_options", {"include_usage": True}),
        ("response_format", {"type": "json_object"}), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("kv_budget", 0), ("cache_salt", ""), ("temprature", 1),
        ("chat_template_kwargs", [1]), ("reasoning_effort", "huge"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), WRONG_CHATS, ids=lambda value: str(value)[:60])
def test_every_field_is_checked(body, field):
    with pytest.raises(Refusal) as found:
        parsed(ChatRequest, json.dumps(body).encode())
    assert (found.value.status, found.value.param) == (400, field)
    assert field in str(found.value) and "constrained" not in str(found.value)


@pytest.mark.parametrize("prompt", [5, None, ["a", "b"], [1.5], {}, [[1]], True])
def test_a_prompt_is_text_or_token_ids(prompt):
    with pytest.raises(Refusal) as found:
        parsed(CompletionRequest, json.dumps({"prompt": prompt}).encode())
    assert found.value.param == "prompt"


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"[]", b"null", b"5", b"[" * 10**5,
     b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"messages": NaN}', b'{"a": 1' + b"0" * 5000 + b"}"],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_request_is_refused(body):
    with pytest.raises(Refusal) as found:
        parsed(ChatRequest, body)
    assert found.value.status == 400


def test_misspelt_fields_name_the_nearest_and_no_url_is_wanted():
    with pytest.raises(Refusal, match="did you mean temperature"):
        parsed(ChatRequest, json.dumps(CHAT | {"temprature": 1}).encode())
    part = {"type": "input_image", "image_url": "http://127.0.0.1/admin"}
    with pytest.raises(Refusal, match="image_url with a data URL"):
        parsed(ChatRequest, json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode())


def test_what_clients_usually_send_is_taken():
    body = CHAT | {
        "user": "me", "metadata": {}, "store": False, "service_tier": "auto", "n": 1, "stop": None,
        "response_format": {"type": "text"}, "tool_choice": "auto", "stream": True, "temperature": 0,
        "stream_options": {"include_usage": True}, "max_completion_tokens": 5, "logit_bias": {},
    }  # fmt: skip
    asked = parsed(ChatRequest, json.dumps(body).encode())
    assert (asked.limit, asked.stops, asked.usage_in_stream) == (5, [], True)
    texts = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
    }
    assert parsed(ChatRequest, json.dumps(texts).encode()).messages[0].text == "ab"
    answered = {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None}
    parsed(ChatRequest, json.dumps({"messages": [answered]}).encode())


@pytest.mark.parametrize(
    "wrong",
    [{"host": "0.0.0.0"}, {"host": "example.org"}, {"api_key": ""}, {"api_key": "ü"}, {"port": 70000},
     {"queue": -1}, {"max_tokens": 0}, {"temp": 3}, {"timeout": 0}, {"origins": ("example.org",)},
     {"origins": ("https://example.org/page",)}, {"origins": ("*",)}],
    ids=str,
)  # fmt: skip
def test_a_server_that_is_not_safe_is_refused(wrong):
    with pytest.raises(ConfigError):
        Settings("demo", **wrong)


def test_who_may_call_the_server_by_which_name():
    assert "localhost" in Settings("demo").names and Settings("demo", "::1").local
    assert Settings("demo", "0.0.0.0", api_key="k").names is None
    assert Settings("demo", "0.0.0.0", api_key="k", allowed_hosts=("a.b",)).names >= {"a.b", "0.0.0.0"}


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.responses.update({200: 3, 429: 1})
    metrics.started(10, 4)
    lines = exposition(metrics, {"running": (2, "Requests that run.")}).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['mlx_kvret_responses_total{status="429"}'] == "1"
    assert values["mlx_kvret_cached_prompt_tokens_total"] == "4" and values["mlx_kvret_running"] == "2"
    allowed = set(string.ascii_letters + string.digits + "_:")
    assert all(set(name.partition("{")[0]) <= allowed for name in values)
    assert sum(line.startswith("# TYPE") for line in lines) == len({n.partition("{")[0] for n in values})
