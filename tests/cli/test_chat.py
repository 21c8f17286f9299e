"""The command ``chat``: its commands, one cache over all turns, what it says when something goes wrong."""

import json

import pytest
from click.testing import CliRunner

from mlx_kvret.cli import main


@pytest.fixture(autouse=True)
def _state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def chat(*lines, options=()):
    arguments = ["chat", "--model", "demo", "--budget", "32", "--max-tokens", "4", *options]
    given = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    return CliRunner().invoke(main, arguments, input=given)


def answers(result):
    """What was said or shown after each prompt."""
    return [part.strip() for part in result.stdout.split(">>")[1:]]


def test_turns_share_a_cache_and_cost_only_what_is_new():
    told = "remember Ada amber the weary miller walks past a quiet river recall Ada"
    result = chat(told, "recall Ada", "/stats", "recall Ada", "/stats", "/quit")
    assert result.exit_code == 0
    first, second, stats, third, more, _ = answers(result)
    assert first == second == third == "amber"
    assert stats.startswith("[remembers 20 of 20 tokens, 0.") and "[last answer: 2 prompt tokens" in stats
    assert more.startswith("[remembers 24 of 24 tokens, 0.") and "a full cache would take 0." in more


def test_save_load_and_reset(tmp_path):
    path = tmp_path / "talk"
    told = "remember Ada amber recall Ada"
    result = chat(told, f"/save {path}", "/reset", "/stats", "recall Ada", f"/load {path}", "recall Ada")
    said, saved, reset, nothing, forgotten, loaded, again, _ = answers(result)
    assert said == again == "amber" != forgotten
    assert reset == "[a new conversation; the cache is empty]"
    assert nothing.startswith("[nothing read yet") and saved.startswith("[saved 8 tokens")
    assert loaded == "[loaded 8 tokens of conversation]"
    assert result.exit_code == 0 and answers(chat(f"/load {path}", "recall Ada"))[1] == "amber"


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(
    "options, kept", [([], "up to 32 tokens per head"), (["--policy", "full"], "every token")]
)
def test_the_first_line_says_how_much_is_kept(backend, options, kept):
    result = chat("/quit", options=["--backend", backend, *options])
    assert result.exit_code == 0 and result.stderr.rstrip().endswith(f"The cache keeps {kept}.")


def test_a_loaded_conversation_says_what_it_goes_on_with(tmp_path):
    chat("remember Ada amber recall Ada", f"/save {tmp_path}/talk")
    options = ["--policy", "recent", "--system", "the quiet river"]
    loaded = answers(chat(f"/load {tmp_path}/talk", options=options))[0].splitlines()
    assert loaded[0] == "[loaded 8 tokens of conversation]"
    assert loaded[1].startswith(
        "[it goes on with scope global, policy learned, sinks 0, window 0, as it was saved"
    )
    assert loaded[2] == "[it goes on with no system message, as it was saved]"


def test_what_goes_wrong_is_said_and_the_conversation_goes_on(tmp_path):
    (tmp_path / "bad").write_text("no cache")
    wrong = ["/save", "/quit now", f"/load {tmp_path}/none", f"/load {tmp_path}/bad", f"/load {tmp_path}"]
    wrong += [f"/save {tmp_path}", f"/save {tmp_path}/no/such/folder", b"caf\xe9"]
    result = chat(*wrong, "remember Ada amber recall Ada", "/quit")
    lines = result.stderr.splitlines()[1:]
    assert len(lines) == len(wrong) and all(line.startswith("error: ") for line in lines), result.stderr
    assert "UTF-8" in lines[-1] and "begin the line with a space" in lines[1]
    assert result.exit_code == 0 and answers(result)[len(wrong)] == "amber"


def test_only_our_commands_are_commands():
    result = chat("/help", "/no_think", "/home/ada/notes.txt", " /quit", "/stats")
    helped, *said, stats, _ = answers(result)
    assert all(name in helped for name in ("/stats", "/save FILE", "/load FILE", "/reset", "/help", "/quit"))
    assert len(said) == 3 and "error" not in result.stderr
    # each of them was read and answered
    assert "[last answer: 2 prompt tokens" in stats


def test_options_that_cannot_work_end_it():
    result = chat("hello", options=["--budget", "0"])
    assert result.exit_code == 1 and result.stderr.startswith("error: budget is 0")


def test_an_answer_that_is_cut_says_so():
    result = chat("the weary miller", options=["--max-tokens", "1"])
    assert result.stderr.splitlines()[-1] == "[cut by --max-tokens 1; /continue goes on]"
    assert "cut" not in chat("remember Ada amber recall Ada").stderr


BAD_NOTES = {
    "none": {},
    "no tokens": {"messages": "[]"},
    "no JSON": {"messages": "[", "tokens": "{"},
    "deep": {"messages": "[" * 100_000, "tokens": "{}"},
    "a list for an object": {"messages": "[]", "tokens": "[]"},
    "a number for messages": {
        "messages": "7",
        "tokens": '{"context": [], "owed": [], "stop": null, "begun": null}',
    },
    "a number for a message": {
        "messages": "[7]",
        "tokens": '{"context": [], "owed": [], "stop": null, "begun": null}',
    },
    "no text": {
        "messages": '[{"role": "user", "content": null}, {"role": "assistant", "content": ""}]',
        "tokens": '{"context": [1], "owed": [], "stop": null, "begun": null}',
    },
    "a turn alone": {
        "messages": '[{"role": "user", "content": "hi"}]',
        "tokens": '{"context": [1], "owed": [], "stop": null, "begun": null}',
    },
    "text for ids": {
        "messages": "[]",
        "tokens": '{"context": "abc", "owed": [], "stop": null, "begun": null}',
    },
    "fractions for ids": {
        "messages": "[]",
        "tokens": '{"context": [1.5], "owed": [], "stop": null, "begun": null}',
    },
    "huge ids": {"messages": "[]", "tokens": '{"context": [], "owed": [1e400], "stop": null, "begun": null}'},
    "true for an id": {
        "messages": "[]",
        "tokens": '{"context": [], "owed": [], "stop": true, "begun": null}',
    },
    "a turn that ends before it begins": {
        "messages": "[]",
        "tokens": '{"context": [], "owed": [], "stop": null,'
        ' "begun": {"text": "", "ids": [1], "head": 2, "tail": 1, "read": 1}}',
    },
    "another length": {
        "messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]',
        "tokens": '{"context": [1, 2], "owed": [], "stop": null, "begun": null}',
    },
}


@pytest.mark.parametrize("notes", BAD_NOTES.values(), ids=BAD_NOTES)
def test_a_saved_cache_with_bad_notes_is_refused_and_the_conversation_goes_on(tmp_path, notes):
    from mlx_kvret.core.snapshot import read_snapshot, write_snapshot

    chat("remember Ada amber recall Ada", f"/save {tmp_path}/talk")
    snapshot = read_snapshot(tmp_path / "talk")
    vars(snapshot)["notes"] = notes
    write_snapshot(tmp_path / "bad", snapshot)
    result = chat("remember Ada amber recall Ada", f"/load {tmp_path}/bad", "recall Ada")
    assert answers(result)[2] == "amber" and result.exit_code == 0
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "conversation" in line and "Traceback" not in result.output


def test_what_a_file_says_is_no_terminal_command(tmp_path):
    from mlx_kvret.core.snapshot import read_snapshot, write_snapshot

    chat("remember Ada amber recall Ada", f"/save {tmp_path}/talk")
    snapshot = read_snapshot(tmp_path / "talk")
    messages = [
        {"role": "system", "content": "\x1b]0;owned\x07\x9b2J"},
        *json.loads(snapshot.notes["messages"]),
    ]
    snapshot.notes["messages"] = json.dumps(messages)
    write_snapshot(tmp_path / "bad", snapshot)
    result = chat(f"/load {tmp_path}/bad")
    assert "owned" in result.output and not set("\x1b\x07\x9b") & set(result.output)
