"""LangChain's chat model, a client of its own kind, against a running server."""

import asyncio

import openai
import pytest

from .running import facts, user

langchain = pytest.importorskip("langchain_openai")
ASKED = f"remember Stella salmon {facts(3)} recall Stella"


def model(server, **options):
    given = {"model": "demo", "api_key": "none", "max_retries": 0, "timeout": 60} | options
    return langchain.ChatOpenAI(base_url=f"{server.url}/v1", **given)


def test_whole_streamed_and_side_by_side(server):
    chat = model(server, temperature=0)
    answer = chat.invoke(user(ASKED))
    assert answer.content == "salmon" and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["input_tokens"] == 15 and answer.usage_metadata["output_tokens"] == 2
    chunks = list(chat.stream(user(ASKED), stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == "salmon" and len(chunks) > 1
    assert sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks) == 2
    # by threads of its own, and by a loop
    assert [one.content for one in chat.batch([user(ASKED)] * 4)] == ["salmon"] * 4
    assert asyncio.run(chat.ainvoke(user(ASKED))).content == "salmon"


def test_a_chain_with_a_history(server):
    from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder

    prompt = ChatPromptTemplate.from_messages(
        [MessagesPlaceholder("before"), ("human", "remember Hugo blue recall {name}")]
    )
    chain = prompt | model(server)
    first = [("human", ASKED), ("ai", "salmon")]
    assert chain.invoke({"before": first, "name": "Hugo"}).content == "blue"
    again = chain.invoke({"before": first, "name": "Hugo"})
    assert again.usage_metadata["input_token_details"]["cache_read"] > 0


def test_options_of_ours_and_probabilities(server):
    chat = model(
        server, extra_body={"kv_budget": 8, "kv_history": True}, logprobs=True, top_logprobs=2, seed=3
    )
    answer = chat.invoke(user(ASKED), stop=["salm"])
    first = answer.response_metadata["logprobs"]["content"][0]
    assert answer.content == "" and first["token"].strip() == "salmon" and len(first["top_logprobs"]) == 2


def test_errors(server):
    with pytest.raises(openai.NotFoundError, match="is not here"):
        model(server, model="other").invoke(user("a"))
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        model(server, max_tokens=10**9).invoke(user("a"))
    with pytest.raises(openai.BadRequestError, match="fetches no URL"):
        picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
        model(server).invoke([{"role": "user", "content": [picture]}])
    assert model(server).invoke(user(ASKED)).content == "salmon"
