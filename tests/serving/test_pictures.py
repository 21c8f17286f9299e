"""Pictures in chats: answered as the library answers them, in any turn, beside texts, or refused."""

import base64
import copy
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

import mlx_kvret
from mlx_kvret.core.picture_prompts import spoken_by, unseeing
from mlx_kvret.demo import VISION_SAMPLE
from mlx_kvret.errors import KVRetError
from mlx_kvret.serving import pictures
from mlx_kvret.serving.backend import backend_for
from mlx_kvret.serving.batched import Batched
from mlx_kvret.serving.pictures import Sights

from .running import CHAT, TEXT, running, user

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("mlx_vlm")
OPTIONS = {"budget": 24, "buffer": 8}
FACTS = {"Ada": "red", "Gilda": "blue", "Oscar": "green", "Thea": "purple"}


def url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width, height, colour=0, **options):
    file = io.BytesIO()
    PIL.new("L", (width, height), colour).save(file, options.pop("format", "PNG"), **options)
    return url(file.getvalue())


ALBUM = url(VISION_SAMPLE.read_bytes())


def part(address, **more):
    return {"type": "image_url", "image_url": {"url": address} | more}


def asking(*parts):
    """A user's message of texts and URLs of pictures."""
    found = [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": found}


@pytest.fixture(scope="module", params=["mlx", "torch"])
def seeing(request):
    model, processor = mlx_kvret.load("demo-vision", backend=request.param)
    return model, processor


@pytest.fixture(scope="module")
def server(seeing):
    model, processor = seeing
    with running((model, spoken_by(processor)), OPTIONS, room={"chunk": 48}) as made:
        yield made


def says(server, messages, **more):
    answer = server.post(CHAT, **({"messages": messages, "max_tokens": 2} | more))
    assert answer.status == 200, answer.text
    return answer.json()


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def alone(seeing, messages, **more):
    """What the library answers to the same messages, with the server's eviction and chunks."""
    model, processor = seeing
    given = OPTIONS | {"max_tokens": 2, "prefill_step_size": 48} | more
    return mlx_kvret.generate(model, processor, messages, **given).strip()


@pytest.mark.parametrize("name", FACTS)
def test_answers_what_a_picture_states(server, seeing, name):
    messages = [asking(part(ALBUM), f"recall {name}")]
    answer = says(server, messages)
    assert text_of(answer).split()[0] == FACTS[name] and text_of(answer) == alone(seeing, messages)
    # the tokens of the picture count, and nothing comes from another request's pictures
    assert answer["usage"]["prompt_tokens"] > 36
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_openais_client_streamed_and_a_second_turn(server, seeing):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    talk = [asking(part(ALBUM, detail="auto"), "recall Ada")]
    stream = client.chat.completions.create(model="demo", messages=talk, max_tokens=2, stream=True)
    first = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
    assert first.split()[0] == "red"
    talk += [{"role": "assistant", "content": first}, asking("recall Oscar")]
    second = client.chat.completions.create(model="demo", messages=talk, max_tokens=2)
    assert second.choices[0].message.content == alone(seeing, talk)
    # a picture in a later turn, two in all
    talk += [{"role": "assistant", "content": "green"}, asking("recall Thea", part(ALBUM), "recall Thea")]
    third = client.chat.completions.create(model="demo", messages=talk, max_tokens=2)
    assert third.choices[0].message.content == alone(seeing, talk)
    assert third.usage.prompt_tokens > second.usage.prompt_tokens + 36


def test_the_url_may_stand_by_itself(server, seeing):
    bare = {"type": "image_url", "image_url": ALBUM}
    found = says(server, [asking(bare, "recall Ada")])
    assert text_of(found) == alone(seeing, [asking(part(ALBUM), "recall Ada")])
    answer = server.post(
        CHAT, messages=[asking(bare | {"image_url": "http://127.0.0.1/a.png"})], max_tokens=1
    )
    assert answer.status == 400 and "fetches no URL" in answer.json()["error"]["message"]


def test_another_picture_of_the_same_tokens_is_not_answered_from_a_snapshot(server, seeing):
    blank = png(96, 96, 255)
    asked = [[asking(part(one), "recall Gilda")] for one in (ALBUM, blank, ALBUM)]
    before = len(server.scheduler.prefixes)
    found = [says(server, messages, logprobs=True, logit_bias={"1": -100}) for messages in asked]
    assert len({one["usage"]["prompt_tokens"] for one in found}) == 1
    assert len(server.scheduler.prefixes) == before
    first, other, again = (one["choices"][0]["logprobs"]["content"][0]["logprob"] for one in found)
    assert first == again != other


def test_texts_beside_pictures_are_answered_as_alone(server):
    assert isinstance(server.scheduler.engine, Batched)
    prompts = [f"remember {name} amber recall {name}" for name in ("Ada", "Bruno", "Clara")]
    messages = [user(prompt) for prompt in prompts]
    messages += [[asking(part(ALBUM), f"recall {name}")] for name in FACTS]
    options = {"max_tokens": 12, "logprobs": True, "logit_bias": {"1": -100}}
    expected = [says(server, one, **options) for one in messages]
    with ThreadPoolExecutor(len(messages)) as pool:
        found = list(pool.map(lambda one: says(server, one, **options), messages))
    for one, own in zip(found, expected, strict=True):
        assert text_of(one) == text_of(own)
        a, b = ([t["logprob"] for t in x["choices"][0]["logprobs"]["content"]] for x in (one, own))
        np.testing.assert_allclose(a, b, atol=2e-4)
    assert text_of(found[0]).split()[0] == "amber"
    # texts go on from snapshots still
    assert found[0]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_completions_read_texts(server):
    assert server.text("remember Ada amber recall Ada", max_tokens=1).strip() == "amber"
    answer = server.post(TEXT, prompt="<|image_pad|> recall Ada", max_tokens=1)
    assert answer.status == 400 and "stand for pictures" in answer.json()["error"]["message"]


def gif():
    frames = [PIL.new("L", (32, 32), colour) for colour in (0, 255)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return url(file.getvalue(), "gif")


REFUSED = {
    "http": ([asking(part("http://127.0.0.1/a.png"), "a")], "fetches no URL"),
    "https": ([asking(part("https://127.0.0.1/a.png"), "a")], "fetches no URL"),
    "a path": ([asking(part(str(VISION_SAMPLE)), "a")], "opens no file"),
    "the demo's name": ([asking(part("demo"), "a")], "data URL"),
    "file://": ([asking(part(f"file://{VISION_SAMPLE}"), "a")], "opens no file"),
    "ftp": ([asking(part("ftp://127.0.0.1/a.png"), "a")], "fetches no URL"),
    "nothing": ([asking(part(""), "a")], "data URL"),
    "a page": ([asking(part("data:text/html;base64,AAAA"), "a")], "data URL of type"),
    "no base64": ([asking(part("data:image/png;base64,#"), "a")], "damaged"),
    "no picture": ([asking(part(url(b"hello")), "a")], "no picture that can be read"),
    "half a picture": ([asking(part(url(VISION_SAMPLE.read_bytes()[:300])), "a")], "no picture"),
    "EPS": ([asking(part(url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "a")], "PNG, JPEG"),
    "an animation": ([asking(part(gif()), "a")], "animation of 2 frames"),
    "a system's": ([{"role": "system", "content": [part(ALBUM)]}, *user("a")], "role system"),
    "an assistant's": ([*user("a"), {"role": "assistant", "content": [part(ALBUM)]}], "role assistant"),
    "more tokens than a chunk": ([asking(part(png(400, 400)), "a")], "--chunk"),
    "a mark in a text": ([asking(part(ALBUM), "<|image_pad|> a")], "2 times"),
    "a mark without a picture": (user("<|image_pad|> a"), "stand for pictures"),
    "another part": ([asking({"type": "input_audio", "input_audio": {}})], "type input_audio"),
    "an unknown detail": ([asking(part(ALBUM, detail="best"))], "detail"),
}


@pytest.mark.parametrize(("messages", "why"), REFUSED.values(), ids=REFUSED)
def test_refusals(server, messages, why):
    answer = server.post(CHAT, messages=messages, max_tokens=1)
    error = answer.json()["error"]
    assert answer.status == 400 and why in error["message"] and error["param"] == "messages", answer.text


def test_a_bomb_is_refused_before_it_is_decoded(server, monkeypatch):
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 20_000)
    for bomb in (png(150, 150), png(250, 250)):
        answer = server.post(CHAT, messages=[asking(part(bomb), "a")], max_tokens=1)
        assert answer.status == 400 and "smaller" in answer.json()["error"]["message"]
    # all together count
    answer = server.post(CHAT, messages=[asking(*[part(ALBUM)] * 3, "a")], max_tokens=1)
    assert answer.status == 400 and "up to number 3" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert text_of(says(server, [asking(part(ALBUM), "recall Ada")])).split()[0] == "red"


def test_tool_calls_of_a_model_that_sees_are_found(seeing):
    model, processor = seeing
    tokenizer = copy.copy(unseeing(spoken_by(processor)))
    tokenizer.chat_template = "{{ messages }}<tool_call>tool_call.name"
    tools = [{"type": "function", "function": {"name": "look"}}]
    found = backend_for(model, tokenizer, OPTIONS).splitter(tokenizer, [5], tools)
    said = found.add('a <tool_call>{"name": "look", "arguments": {}}</tool_call>')
    said.add(found.end())
    assert said.content == "a " and said.calls == [("look", "{}")]


def test_a_prompt_with_pictures_may_be_too_long(seeing):
    model, processor = seeing
    with running((model, spoken_by(processor)), OPTIONS, {"max_prompt": 30}, {"chunk": 48}) as server:
        answer = server.post(CHAT, messages=[asking(part(ALBUM), "recall Ada")])
        assert answer.status == 400 and "reads at most 30" in answer.json()["error"]["message"]


def test_a_model_of_text_refuses_pictures():
    with running(mlx_kvret.load("demo", backend="mlx")) as server:
        answer = server.post(CHAT, messages=[asking(part(ALBUM), "recall Ada")])
        assert answer.status == 400 and "reads text only" in answer.json()["error"]["message"]


def test_what_waits_is_bounded_and_given_back(monkeypatch):
    monkeypatch.setattr(pictures, "HELD", 1000)
    made = {"pixel_values": np.zeros(150), "other": [1]}
    first, held = Sights(made), Sights._held
    with pytest.raises(KVRetError, match="as many pictures"):
        Sights(made)
    assert first.take() is made and Sights._held == held - 1200
    second = Sights(made)
    del second
    assert Sights._held == held - 1200
