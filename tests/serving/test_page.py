"""The page at ``/`` in a browser, and the history that it asks for."""

import threading

from page.browsing import expected, opened, shades, slide

import mlx_kvret
from mlx_kvret.core.history import History
from mlx_kvret.serving.engine import OneByOne

from .running import CHAT, OPTIONS, TEXT, facts, running, user

TALK = [
    "remember Stella salmon " + facts(24) + " recall Stella",
    facts(20, 3) + " recall Ada",
    "recall Stella",
]


def chat(server, messages, max_tokens=40, **more):
    response = server.post(CHAT, messages=messages, kv_history=True, max_tokens=max_tokens, **more)
    assert response.status == 200, response.text
    return response.json()


def test_as_a_cache_alone(loaded, server):
    """What is told is what a cache of one sequence holds that reads the same in the same chunks."""
    model, tokenizer = loaded
    ids = tokenizer.encode("remember Stella salmon " + facts(60) + " recall Stella")
    found = server.post(TEXT, prompt=ids, kv_history=True, max_tokens=30, cache_salt="alone").json()
    told = found["kv_history"]
    history = History.from_dict(told)
    backend = mlx_kvret.api.backend_of(model)
    cache, seen = mlx_kvret.make_cache(model, **OPTIONS), {}
    for start in range(0, len(ids) - 1, 32):
        backend.read_tokens(model, cache, ids[start : min(start + 32, len(ids) - 1)], 32)
        seen[cache.seen] = cache.kept_positions()
    for response in mlx_kvret.stream_generate(model, tokenizer, ids[-1:], cache=cache, max_tokens=30):
        seen[response.seen] = cache.kept_positions()
    assert history.now.seen == len(ids) + found["usage"]["completion_tokens"] == cache.seen
    assert len(history.compactions) >= 4 and told["cached"] == 0
    assert history.now.entries == found["usage"]["kv_entries"] == cache.entries
    for at in [*range(len(history.compactions)), None]:
        kept = seen[history.moment(at).seen]
        for layer, heads in enumerate(kept):
            for head, positions in enumerate(heads):
                assert history.held(at, layer, head).nonzero()[0].tolist() == positions.tolist()
    assert found["choices"][0]["text"].strip() in "".join(told["texts"])


def test_rows_that_do_not_batch(loaded, server):
    """One after the other as together."""
    with running(loaded) as other:
        other.scheduler.engine = OneByOne(other.backend)
        found = [chat(one, user(TALK[0]), cache_salt="one by one") for one in (server, other)]
    assert found[0]["kv_history"]["gone"] == found[1]["kv_history"]["gone"]


def test_answers_are_the_same_with_and_without_under_load(server):
    asked = [user(f"{facts(20 + n, n)} recall Ada") for n in range(8)]
    plain = [
        server.post(CHAT, messages=one, logprobs=True, cache_salt="a").json()["choices"] for one in asked
    ]
    alone = [chat(server, one, cache_salt="b")["kv_history"] for one in asked]
    found = [None] * 8

    def ask(at):
        found[at] = chat(server, asked[at], logprobs=True, cache_salt="c")

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, told, before in zip(found, alone, plain, strict=True):
        assert one["choices"][0]["message"] == before[0]["message"]
        assert [one["kv_history"][name] for name in ("gone", "compactions")] == [
            told["gone"],
            [[*moment[:2], bytes] for moment, bytes in zip(told["compactions"], sizes(one), strict=True)],
        ]
    assert server.scheduler.metrics.failed_steps == 0


def sizes(found):
    """Bytes depend on how many stand in the arena."""
    return [moment[2] for moment in found["kv_history"]["compactions"]]


def test_streamed(server):
    body = {"messages": user(TALK[0]), "cache_salt": "stream", "kv_history": True, "max_tokens": 40}
    whole = chat(server, body["messages"], cache_salt="whole")["kv_history"]
    events = server.post(CHAT, **body, stream=True).events()
    (told,) = [event["kv_history"] for event in events if "kv_history" in event]
    assert told["gone"] == whole["gone"] and events[-1]["choices"] == []
    assert all(
        "kv_history" not in e
        for e in server.post(CHAT, messages=user("a"), max_tokens=3, stream=True).events()
    )


def test_the_next_turn_begins_with_what_is_left(server):
    messages, before = [], None
    for text in TALK:
        messages += user(text)
        found = chat(server, messages, cache_salt="turns")
        messages.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
        told = found["kv_history"]
        history = History.from_dict(told)
        if before is not None:
            assert told["cached"] == before.now.seen == history.compactions[0].seen
            assert (history.gone[:, : before.now.seen] == 0).sum() == (
                before.gone < len(before.compactions)
            ).sum()
        before = history


def test_another_salt_tells_nothing_of_a_prefix(server):
    chat(server, user(TALK[0]), cache_salt="mine")
    assert chat(server, user(TALK[0]), cache_salt="yours")["kv_history"]["cached"] == 0
    assert chat(server, user(TALK[0]), cache_salt="mine")["kv_history"]["cached"] > 0


def test_a_budget_of_its_own(server):
    told = chat(server, user(TALK[0]), kv_budget=8, cache_salt="small")["kv_history"]
    history = History.from_dict(told)
    assert (
        told["budget"] == 8
        and history.now.entries <= (8 + OPTIONS["buffer"]) * told["layers"] * told["kv_heads"]
    )


def test_too_long_for_notes(server, monkeypatch):
    monkeypatch.setattr("mlx_kvret.serving.showing.MOST", 600)
    # as many tokens as it gives
    refused = server.post(CHAT, messages=user("a"), kv_history=True)
    assert refused.status == 400 and refused.json()["error"]["param"] == "kv_history"
    assert "at most 100" in refused.json()["error"]["message"]
    assert server.post(CHAT, messages=user("a"), max_tokens=3).status == 200
    assert chat(server, user("a"), max_tokens=20)


def test_files_and_their_policy(mlx_server):
    page = mlx_server.ask("GET", "/")
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in ("view.js", "talk.js", "style.css", "talk.css"):
        assert f"page/{name}" in page.text
        assert mlx_server.ask("GET", f"/page/{name}").status == 200
    for path in ("/page/inspect.html", "/page/files.py", "/page/../settings.py", "/page/%2e%2e/settings.py"):
        assert mlx_server.ask("GET", path).status == 404
    assert mlx_server.ask("POST", "/", "{}", Content_Type="application/json").status == 405
    assert mlx_server.ask("GET", "/", Host="evil.example").status == 403
    assert mlx_server.ask("GET", "/", Origin="https://evil.example").status == 403


def test_without_a_page(demo_mlx):
    with running(demo_mlx, settings={"page": False, "api_key": "secret"}) as server:
        assert server.ask("GET", "/").status == 401
        key = {"Authorization": "Bearer secret", "Content_Type": "application/json"}
        assert server.ask("GET", "/", **key).status == 404
        asked = '{"messages": [{"role": "user", "content": "a"}], "kv_history": true}'
        assert "--no-page" in server.ask("POST", CHAT, asked, **key).json()["error"]["message"]


# ---------------------------------------------------------------- in a browser


def say(page, text, turns):
    page.fill("#text", text)
    page.click("#send")
    page.wait_for_selector(f"body[data-turns='{turns}']", timeout=20_000)


def test_talk(browser, mlx_server):
    """A message sent, tokens shaded, the gauge moved, nothing asked of another host, no complaints."""
    messages, told = [], []
    for text in TALK:
        messages += user(text)
        found = chat(mlx_server, messages, max_tokens=200, cache_salt="beside the page")
        messages.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
        told.append(found["kv_history"])
    histories = [History.from_dict(one) for one in told]
    with opened(browser, mlx_server.url) as seen:
        page = seen.page
        page.wait_for_selector("body[data-ready]")
        assert page.is_hidden("#memory") and "demo" in page.inner_text("h1")
        gauges = []
        for turn, text in enumerate(TALK):
            say(page, text, 2 * turn + 2)
            assert shades(page) == expected(histories[turn], None)
            assert page.locator("#said .assistant").nth(turn).inner_text().split()[-1] == (
                messages[2 * turn + 1]["content"].strip()
            )
            gauges.append(page.evaluate("({...document.querySelector('.gauge').dataset})"))
        full = [int(gauge["full"]) for gauge in gauges]
        bounded = [int(gauge["bounded"]) for gauge in gauges]
        assert full[0] < full[1] < full[2] and max(bounded) < full[2] and max(bounded) <= 1.5 * min(bounded)
        # compactions of the first turn are told by the last one's page
        first, last = histories[0], histories[-1]
        assert len(first.compactions) >= 2
        for at in range(len(first.compactions)):
            slide(page, at)
            mine = expected(first, at)
            assert shades(page) == mine + ["ahead"] * (last.now.seen - len(mine))
        assert page.inner_text("#trouble") == "" and seen.complaints == []
        assert all(url.startswith(mlx_server.url) for url in seen.asked)
        page.click("#new")
        assert page.is_hidden("#memory") and page.inner_text("#said") == ""


def test_a_key_is_asked_for(browser, demo_mlx):
    with running(demo_mlx, settings={"api_key": "secret"}) as server, opened(browser, server.url) as seen:
        page = seen.page
        page.wait_for_selector("#door:not([hidden])")
        page.fill("#key", "wrong")
        page.click("#door button")
        page.wait_for_selector("#trouble:has-text('not this server')")
        page.fill("#key", "secret")
        page.click("#door button")
        page.wait_for_selector("body[data-ready]")
        say(page, TALK[0], 2)
        assert len(set(shades(page)) - {"l0"}) > 2 and page.is_hidden("#door")


def test_trouble_is_told_and_the_message_stays(browser, mlx_server):
    with opened(browser, mlx_server.url) as seen:
        page = seen.page
        page.wait_for_selector("body[data-ready]")
        page.evaluate("document.querySelector('#budget').value = 99999")
        page.fill("#text", "<img src=x onerror=alert(1)> recall Stella")
        page.click("#send")
        page.wait_for_selector("#trouble:has-text('kv_budget')")
        assert page.input_value("#text").startswith("<img") and page.inner_text("#said") == ""
        page.evaluate("document.querySelector('#budget').value = ''")
        page.click("#send")
        page.wait_for_selector("body[data-turns='2']")
        assert page.locator("#said img").count() == 0 and "<img" in page.inner_text("#said")
        assert not [one for one in seen.complaints if "400" not in one]


def test_talk_on_a_phone(browser, mlx_server):
    with opened(browser, mlx_server.url, 340, 700) as seen:
        page = seen.page
        page.wait_for_selector("body[data-ready]")
        say(page, TALK[0], 2)
        page.click("#ask summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= 340


def test_stop(browser, mlx_server):
    with opened(browser, mlx_server.url) as seen:
        page = seen.page
        page.wait_for_selector("body[data-ready]")
        page.fill("#text", " ".join([TALK[0]] * 60))
        page.click("#send")
        page.click("#stop")
        page.wait_for_selector("#stop[disabled]")
        mlx_server.until(lambda: mlx_server.idle)
        say(page, "recall Stella", page.evaluate("Number(document.body.dataset.turns || 0)") + 2)
