"""Thoughts and tool calls, by mlx-lm's own marks and parsers: whole, streamed, and cut anywhere."""

import json
import random

import openai
import pytest
import torch
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from transformers import PreTrainedTokenizerFast

from mlx_kvret.demo import MODEL
from mlx_kvret.serving.backend import backend_for
from mlx_kvret.serving.channels import Said
from mlx_kvret.serving.failures import Refusal
from mlx_kvret.serving.marks import Marked

from .running import CHAT, OPTIONS, running, user

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '{"name":"weather","arguments":{"town":"Bern"}}'
TEMPLATE = (
    "{{ bos_token }}{% if tools %} remember{% endif %}{% for message in messages %} {{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt and enable_thinking %} <think>{% endif %}"
)
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "{broken"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The demo's, some of whose words are marks."""
    found = json.loads((MODEL / "tokenizer.json").read_text())
    words = found["model"]["vocab"]
    for word, mark in zip(list(words)[-len(MARKS) :], MARKS, strict=True):
        words[mark] = words.pop(word)
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    path.write_text(json.dumps(found))
    inner = PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token=".", unk_token="<unk>", chat_template=TEMPLATE
    )
    return TokenizerWrapper(
        inner, lambda _: None, None, None, "<tool_call>", "</tool_call>", json_tools.parse_tool_call
    )


@pytest.fixture(scope="module")
def server(loaded, tokenizer):
    """On torch the tokenizer is that of transformers, whose parser is found by its name."""
    model, own = loaded[0], tokenizer
    if isinstance(model, torch.nn.Module):
        own = tokenizer._tokenizer
        own.init_kwargs["tool_parser_type"] = "json_tools"
    with running((model, own)) as made:
        yield made


@pytest.fixture(params=["whole", "streamed"])
def answer(request, server, monkeypatch):
    """Has the model say some words, whatever it would; the message that comes of it, and why it ended."""

    def asked(*words, **body):
        ids = [*server.service.tokenizer.convert_tokens_to_ids(list(words)), *server.backend.ends]
        script = iter(ids)
        monkeypatch.setattr(
            server.backend, "chooser", lambda asked: lambda _: server.backend.array(next(script, ids[-1]))
        )
        body = {"messages": user("Ada"), "max_tokens": 20} | body
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            if request.param == "whole":
                choice = client.chat.completions.create(model="demo", **body).choices[0]
                calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
                thought = getattr(choice.message, "reasoning_content", "")
                return choice.message.content or "", thought, calls, choice.finish_reason
            content, thought, calls, reason = "", "", [], None
            for chunk in client.chat.completions.create(model="demo", stream=True, **body):
                (choice,) = chunk.choices
                content += choice.delta.content or ""
                thought += getattr(choice.delta, "reasoning_content", "")
                for call in choice.delta.tool_calls or ():
                    assert call.index == len(calls) and call.id
                    calls.append((call.function.name, call.function.arguments))
                reason = choice.finish_reason or reason
            return content, thought, calls, reason

    return asked


def test_a_thought_is_told_apart(answer):
    content, thought, calls, reason = answer("<think>", "Anna", "Ada", "</think>", "amber")
    assert (content.split(), thought.split(), calls, reason) == (["amber"], ["Anna", "Ada"], [], "stop")


def test_a_thought_that_the_prompt_opened(answer):
    said = answer("Anna", "</think>", "amber", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert (said[0].split(), said[1].split()) == (["amber"], ["Anna"])


def test_a_thought_that_is_cut(answer):
    content, thought, _, reason = answer("<think>", "Anna", "Ada", max_tokens=2)
    assert (content, thought.split(), reason) == ("", ["Anna"], "length")


def test_tool_calls(answer):
    said = answer(
        "Ada", "<tool_call>", CALL, "</tool_call>", "<tool_call>", CALL, "</tool_call>", tools=TOOLS
    )
    assert said[0].split() == ["Ada"] and said[3] == "tool_calls"
    assert [(name, json.loads(arguments)) for name, arguments in said[2]] == [
        ("weather", {"town": "Bern"})
    ] * 2


def test_a_call_that_is_none_is_text(answer):
    content, _, calls, reason = answer("<tool_call>", "{broken", "</tool_call>", "Ada", tools=TOOLS)
    assert content.split() == ["<tool_call>", "{broken", "</tool_call>", "Ada"]
    assert (calls, reason) == ([], "stop")


def test_a_stop_counts_in_a_thought_too(answer):
    content, thought, _, reason = answer("<think>", "Anna", "Ada", "amber", stop=["Ada"])
    assert (content, thought.split(), reason) == ("", ["Anna"], "stop")


def test_what_a_call_gave_is_asked_about(answer):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"town": "Bern"}'},
    }
    messages = [
        *user("Ada"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "amber"},
    ]
    assert answer("Anna", messages=messages, tools=TOOLS)[0].split() == ["Anna"]


def test_tools_are_shown_to_the_template_only_if_they_may_be_called(server):
    def tokens(**more):
        body = {"messages": user("Ada"), "max_tokens": 1} | more
        return server.post(CHAT, **body).json()["usage"]["prompt_tokens"]

    assert tokens(tools=TOOLS) == tokens() + 1
    assert tokens(tools=TOOLS, tool_choice="none") == tokens()


def test_text_may_be_cut_anywhere(tokenizer):
    text = f"a <think>b c</think> d <tool_call>{CALL}</tool_call> e <tool_call>{{broken</tool_call> f"
    drawn, whole = random.Random(0), None
    for _ in range(100):
        marked, said, place = Marked(tokenizer, [], TOOLS), Said(), 0
        while place < len(text):
            size = drawn.randrange(1, 12)
            said.add(marked.add(text[place : place + size]))
            place += size
        said.add(marked.end())
        whole = whole or said
        assert said == whole
    assert whole.reasoning == "b c" and whole.calls == [("weather", '{"town": "Bern"}')]
    assert whole.content == "a  d  e <tool_call>{broken</tool_call> f"


def test_without_parsers_tools_are_refused(loaded, monkeypatch):
    if not isinstance(loaded[0], torch.nn.Module):
        pytest.skip("on MLX they are always there")
    monkeypatch.setattr("mlx_kvret.serving.on_torch.installed", lambda backend: False)
    backend = backend_for(*loaded, OPTIONS)
    with pytest.raises(Refusal, match="drop tools"):
        backend.splitter(loaded[1], [1], TOOLS)
    assert backend.splitter(loaded[1], [1], None).add("<think>").content == "<think>"
