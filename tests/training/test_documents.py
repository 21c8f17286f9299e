"""Records as tokens: chat templates, and which tokens are learnt."""

import pytest
from transformers import AutoTokenizer

from mlx_kvret.demo import MODEL
from mlx_kvret.errors import DataError
from mlx_kvret.training.documents import document
from mlx_kvret.training.records import Record

CHAT = [
    {"role": "user", "content": "remember Ada red recall Ada"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "recall Ada"},
    {"role": "assistant", "content": "red"},
]
# rewrites earlier turns as some reasoning models' templates do: thoughts go once there is a later question
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s> {% if loop.last %}blue {% endif %}"
    "{{ m.content }} .{% else %}<s> {{ m.content }} .{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<s> {% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def learnt(tokenizer, messages, loss="assistant"):
    made = document(Record("f:1", messages=messages), tokenizer, loss)
    return [tokenizer.decode([i]) for i in made.ids[made.learn]]


def test_text(tokenizer):
    made = document(Record("a.txt", text="remember Ada red"), tokenizer, "all")
    assert tokenizer.decode(made.ids) == "<s> remember Ada red"
    assert made.learn.all()


def test_all_of_a_chat(tokenizer):
    made = document(Record("f:1", messages=CHAT), tokenizer, "all")
    assert tokenizer.decode(made.ids) == "<s> remember Ada red recall Ada red . recall Ada red ."
    assert made.learn.all()


def test_what_the_assistant_says_and_the_end_of_its_turn(tokenizer):
    assert learnt(tokenizer, CHAT) == ["red", ".", "red", "."]


def test_templates_that_rewrite_earlier_answers(tokenizer):
    tokenizer.chat_template = THINKING
    assert learnt(tokenizer, CHAT) == ["red", ".", "blue", "red", "."]


def test_templates_with_generation_marks(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
    )
    assert learnt(tokenizer, CHAT) == ["red", "red"]


def test_templates_that_drop_earlier_turns(tokenizer):
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match=r"f:1: the chat template rewrites earlier turns.*--loss all"):
        learnt(tokenizer, CHAT)


@pytest.mark.parametrize(
    "record, loss, message",
    [
        (Record("a.txt", text="remember Ada red"), "assistant", "plain text"),
        (Record("a.txt:3", text=""), "all", "a.txt:3 has 1 tokens and none to learn from"),
        (Record("f:1", messages=CHAT[:1]), "assistant", "none to learn from"),
        (
            Record("f:1", messages=[CHAT[0], {"role": "assistant", "content": " "}]),
            "assistant",
            "message 1 has no text",
        ),
        (Record("f:1", messages=[{"role": "user", "content": None}, {}]), "all", "refuses it"),
    ],
)
def test_refuses(tokenizer, record, loss, message):
    with pytest.raises(DataError, match=message):
        document(record, tokenizer, loss)


def test_refuses_messages_without_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        learnt(tokenizer, CHAT)


TOOLS = [{"type": "function", "function": {"name": "look"}}]
CALLING = (
    "{% if tools %}<s> {{ tools[0].function.name }} . {% endif %}"
    "{% for m in messages %}<s> {{ m.content }} {% if m.tool_calls %}recall {% endif %}"
    "{% if m.thinking %}{{ m.thinking }} {% endif %}. {% endfor %}"
)


def words(tokenizer, record):
    return tokenizer.decode(document(record, tokenizer, "all").ids)


def test_tools_reach_the_template(tokenizer):
    chat, plain = [CHAT[0] | {"tool_calls": [1]}, CHAT[1] | {"thinking": "blue"}], CHAT[:2]
    tokenizer.chat_template = CALLING
    told = [
        words(tokenizer, Record("f:1", messages=m, tools=t)) for m in (plain, chat) for t in (None, TOOLS)
    ]
    assert len(set(told)) == 4 and "recall ." in told[2] and "blue" in told[2]


@pytest.mark.parametrize(
    "record, field",
    [
        (Record("f:1", messages=CHAT, tools=TOOLS), "tools"),
        (Record("f:1", messages=[CHAT[0], CHAT[1] | {"tool_calls": [1]}]), "tool_calls"),
        (Record("f:1", messages=[CHAT[0], CHAT[1] | {"reasoning_content": "blue"}]), "reasoning_content"),
    ],
)
@pytest.mark.parametrize("loss", ["all", "assistant"])
def test_what_the_template_does_not_show_is_refused(tokenizer, record, field, loss):
    with pytest.raises(DataError, match=rf"f:1 has {field}, and the model's chat template does not show"):
        document(record, tokenizer, loss)
