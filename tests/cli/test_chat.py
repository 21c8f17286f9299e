"""Conversations: one cache over all turns, saved, loaded and reset."""

import pytest
from click.testing import CliRunner

from mlx_kvret.cli import main
from mlx_kvret.cli.chat import Conversation


@pytest.fixture(autouse=True)
def _state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def chat(*lines, options=()):
    arguments = ["chat", "--model", "demo", "--budget", "32", "--max-tokens", "4", *options]
    return CliRunner().invoke(main, arguments, input="".join(f"{line}\n" for line in lines))


def answers(result):
    """What was said or shown after each prompt."""
    return [part.strip() for part in result.stdout.split(">>")[1:]]


def test_turns_share_a_cache_and_cost_only_what_is_new():
    told = "remember Ada amber the weary miller walks past a quiet river recall Ada"
    result = chat(told, "recall Ada", "/stats", "recall Ada", "/stats", "/quit")
    assert result.exit_code == 0
    first, second, stats, third, more, _ = answers(result)
    assert first == second == third == "amber"
    assert stats.startswith("[2 prompt tokens") and "of 20 tokens" in stats
    assert more.startswith("[2 prompt tokens") and "of 24 tokens" in more


def test_save_load_and_reset(tmp_path):
    path = tmp_path / "talk"
    told = "remember Ada amber recall Ada"
    result = chat(told, f"/save {path}", "/reset", "/stats", "recall Ada", f"/load {path}", "recall Ada")
    said, saved, _, nothing, forgotten, loaded, again, _ = answers(result)
    assert said == again == "amber" != forgotten
    assert nothing.startswith("[nothing read yet") and saved.startswith("[saved 8 tokens")
    assert loaded == "[loaded 8 tokens of conversation]"
    assert result.exit_code == 0 and answers(chat(f"/load {path}", "recall Ada"))[1] == "amber"


def test_what_goes_wrong_is_said_and_the_conversation_goes_on(tmp_path):
    (tmp_path / "bad").write_text("no cache")
    result = chat("/save", "/nope", f"/load {tmp_path}/none", f"/load {tmp_path}/bad", "recall Ada", "/quit")
    assert result.exit_code == 0
    assert result.stderr.count("error: ") == 4 and answers(result)[4]


def test_options_that_cannot_work_end_it():
    result = chat("hello", options=["--budget", "0"])
    assert result.exit_code == 1 and result.stderr.startswith("error: budget is 0")


class Template:
    """A tokenizer whose template rewrites earlier turns."""

    bos_token = "<s>"

    def apply_chat_template(self, messages, **_):
        return "<s>" + "".join(f"[{len(messages)}{m['content']}]" for m in messages)


def test_a_template_that_rewrites_earlier_turns_costs_the_last_message_alone():
    talk = object.__new__(Conversation)
    talk.tokenizer, talk.context = Template(), "<s>[1a]b"
    talk.messages = [{"content": "a"}, {"content": "b"}, {"content": "c"}]
    assert talk.new_text() == "[1c]"
