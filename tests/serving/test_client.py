"""OpenAI's own client against a running server."""

import openai
import pytest

from .running import facts, user

ASKED = f"remember Stella salmon {facts(3)} recall Stella"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_chat(client):
    answer = client.chat.completions.create(model="demo", messages=user(ASKED))
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        "salmon",
        "assistant",
        "stop",
    )
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (15, 2, 17)
    assert usage.kv_entries > 0 and usage.kv_bytes > 0
    # the same again is read from before its last token
    again = client.chat.completions.create(model="demo", messages=user(ASKED))
    assert again.choices[0].message.content == "salmon"
    assert again.usage.prompt_tokens_details.cached_tokens == 14


def test_a_stream_says_what_the_whole_answer_does(client):
    options = {"model": "demo", "messages": user(facts(5)), "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and text
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks[:-1])


def test_a_completion(client):
    answer = client.completions.create(model="demo", prompt=ASKED, max_tokens=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("salmon", "length")
    stream = client.completions.create(model="demo", prompt=ASKED, max_tokens=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "salmon"


def test_token_ids_are_a_prompt(client, server):
    ids = server.service.tokenizer.encode(ASKED)
    assert client.completions.create(model="demo", prompt=ids, max_tokens=1).choices[0].text == "salmon"


def test_log_probabilities(client):
    options = {"model": "demo", "messages": user(ASKED), "logprobs": True, "top_logprobs": 3}
    (told,) = client.chat.completions.create(**options).choices[0].logprobs.content
    assert told.token == "salmon" and bytes(told.bytes) == b"salmon"
    assert told.top_logprobs[0].token == "salmon" and told.top_logprobs[0].logprob == told.logprob <= 0
    values = [one.logprob for one in told.top_logprobs]
    assert len(values) == 3 and values == sorted(values, reverse=True)
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [one.token for part in streamed for one in part] == ["salmon"]
    completion = client.completions.create(model="demo", prompt=ASKED, logprobs=2, max_tokens=1)
    found = completion.choices[0].logprobs
    assert found.tokens == ["salmon"] and len(found.top_logprobs[0]) == 2 and found.text_offset == [0]


def test_a_stop_ends_the_answer_and_is_not_shown(client):
    options = {"model": "demo", "messages": user(facts(5)), "max_tokens": 12}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = whole.split()[1]
    for stream in (False, True):
        found = client.chat.completions.create(**options, stop=[stop, "never"], stream=stream)
        if stream:
            chunks = list(found)
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_makes_draws_repeatable(client):
    def drawn(seed):
        options = {"messages": user("the weary"), "temperature": 1.5, "max_tokens": 12, "seed": seed}
        return client.chat.completions.create(model="demo", **options).choices[0].message.content

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_a_bias_and_a_penalty_change_the_choice(client, server):
    (token,) = server.service.tokenizer.encode("salmon", add_special_tokens=False)
    options = {"model": "demo", "prompt": ASKED, "max_tokens": 1}
    banned = client.completions.create(**options, logit_bias={str(token): -100})
    assert banned.choices[0].text != "salmon"
    options |= {"prompt": "the weary", "max_tokens": 16}
    words = client.completions.create(**options, frequency_penalty=2.0).choices[0].text.split()
    plain = client.completions.create(**options).choices[0].text.split()
    assert words != plain


def test_what_is_wrong_is_said_in_openai_s_shape(client):
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-5", messages=user("x"))
    assert found.value.code == "model_not_found" and "demo" in found.value.message
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="demo", messages=user("x"), n=2)
    assert found.value.param == "n"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="demo", messages=user("x"), extra_body={"kv_budget": 33})
    assert "33" in found.value.message and "at most 32" in found.value.message


def test_a_budget_of_one_s_own(client):
    def entries(**extra):
        options = {"model": "demo", "messages": user(facts(30)), "max_tokens": 1}
        return client.chat.completions.create(**options, extra_body=extra).usage.kv_entries

    assert entries(kv_budget=8) < entries(kv_budget=32) == entries()


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_stream_that_says_nothing_yet_is_kept_open(server, monkeypatch):
    """Comments, which clients pass over, come before the first token and lose none."""
    monkeypatch.setattr("mlx_kvret.serving.answering.SILENCE", 0.002)
    body = {"messages": user(f"remember Stella salmon {facts(90)} recall Stella"), "max_tokens": 5}
    whole = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
    reply = server.post("/v1/chat/completions", **body, cache_salt="new", stream=True)
    assert ": waiting" in reply.text
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events()) == whole
