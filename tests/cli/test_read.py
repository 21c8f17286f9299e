"""The commands read, ask and info on what was saved; generate and chat that go on with it."""

import json

import pytest
from click.testing import CliRunner

from mlx_kvret.cli import main
from mlx_kvret.cli.ask import shown

FILLER = "the weary miller walks past a quiet river and "
STORY = "remember Ada amber and " + FILLER * 4 + "remember Frank copper and " + FILLER * 20
DEMO = ["--model", "demo"]


def run(*arguments, text=None):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=text)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A reading that was saved."""
    folder = tmp_path_factory.mktemp("read")
    (folder / "story.txt").write_text(STORY, "utf-8")
    result = run("read", *DEMO, folder / "story.txt", "--budget", 32, "--save", folder / "notes.kv")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("read 225 tokens into 0.0") and "notes.kv" in result.stderr
    return folder / "notes.kv"


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_reading_goes_on_in_every_command_on_either_backend(notes, backend):
    where = [*DEMO, "--backend", backend, "--cache", notes]
    asked = ["--prompt", "recall Frank"]
    assert run("generate", *where, *asked).stdout.split() == ["copper"]
    chat = run("chat", *where, "--max-tokens", 4, text="recall Frank\nrecall Ada\n/stats\n")
    assert [part.split()[0] for part in chat.stdout.split(">>")[1:3]] == ["copper", "amber"], chat.output
    assert "remembers 3" in chat.stdout and "The cache keeps up to 32 tokens per head." in chat.stderr
    found = run("ask", *where, "--question", "recall Ada", "--question", "recall Frank")
    assert found.stdout == "> recall Ada\namber\n\n> recall Frank\ncopper\n"


def test_questions_from_a_file_and_answers_to_one(notes, tmp_path):
    (tmp_path / "asked").write_text("recall Ada\n\n  recall Frank \n", "utf-8")
    where = ["ask", *DEMO, "--cache", notes]
    found = run(*where, tmp_path / "asked", "--question", "the weary", "--max-tokens", 4,
                "--output", tmp_path / "a.jsonl")  # fmt: skip
    assert (found.exit_code, found.stdout) == (0, "")
    assert found.stderr.splitlines()[-1] == "[1 of 3 answers cut by --max-tokens 4]"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines[:2]] == ["amber", "copper"]
    assert [line["complete"] for line in lines] == [True, True, False]
    assert lines[2]["question"] == "the weary"
    assert run(*where, "-", "--output", tmp_path / "a.txt", text="recall Ada\n").exit_code == 0
    assert (tmp_path / "a.txt").read_text() == shown("recall Ada", "amber", 0) + "\n"


def test_several_files_standard_input_and_the_template(tmp_path):
    (tmp_path / "more").write_text("remember Frank copper", "utf-8")
    for extra in ([], ["--ignore-chat-template"]):
        result = run("read", *DEMO, "-", tmp_path / "more", "--budget", 32, *extra, "--save", tmp_path / "kv",
                     text="remember Ada amber")  # fmt: skip
        assert result.exit_code == 0, result.output
        found = run("ask", *DEMO, "--cache", tmp_path / "kv", "--question", "recall Ada")
        assert found.stdout.split()[-1] == "amber"
        shows = run("info", tmp_path / "kv").stdout
        assert ("text as it is" if extra else "a text that waits for a question") in shows
    chat = run("chat", *DEMO, "--cache", tmp_path / "kv", text="hi\n")
    assert chat.exit_code == 1 and "holds a cache but no conversation" in chat.stderr


def test_a_chat_that_was_saved_can_be_asked(tmp_path):
    run("chat", *DEMO, "--budget", 32, "--max-tokens", 4, text=f"remember Ada amber\n/save {tmp_path}/t.kv\n")
    assert (
        run("ask", *DEMO, "--cache", tmp_path / "t.kv", "--question", "recall Ada").stdout.split()[-1]
        == "amber"
    )
    assert "a conversation of 2 messages" in run("info", tmp_path / "t.kv").stdout


def test_info_says_what_a_saved_cache_is(notes):
    result = run("info", notes)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    said = ["tokens read  225", "budget       32 tokens per KV head and a buffer of 4", "policy learned"]
    said += ["in 3 layers of 2 KV heads", "full cache would take 0.35 MB", "waits for a question"]
    for part in said:
        assert any(part in line for line in lines), part
    from mlx_kvret.core.snapshot import read_snapshot

    snapshot = read_snapshot(notes)
    parts = lines[lines.index("  kept of each part of the text") + 1 :]
    assert len(parts) == 16 and parts[-1].split()[2] == "225"
    first = int((snapshot.position < 14).sum()) / (14 * 6)
    assert parts[0].endswith(f"{first:.1%}") and max(part.count("#") for part in parts) == 24
    assert f"{len(snapshot.position):,} of 1,350" in result.stdout


def test_info_refuses_what_is_damaged(notes, tmp_path):
    content = bytearray(notes.read_bytes())
    content[-9] ^= 1
    (tmp_path / "bad.kv").write_bytes(content)
    (tmp_path / "text").write_text("no cache")
    for name, reason in (("bad.kv", "checksum"), ("text", "not a whole safetensors file")):
        result = run("info", tmp_path / name)
        assert (result.exit_code, result.stdout) == (1, "") and reason in result.stderr
    result = run("info", notes, "--budget", 64)
    assert result.exit_code == 1 and "say nothing" in result.stderr


SAVE, ASK = ["--save", "{here}/x.kv"], ["--question", "recall Ada"]
REFUSED = {
    "no file": (["read", *DEMO, *SAVE], 2, "FILE"),
    "no such file": (["read", *DEMO, "{here}/none", *SAVE], 1, "No such file"),
    "latin-1": (["read", *DEMO, "{here}/latin", *SAVE], 1, "UTF-8"),
    "nothing to read": (["read", *DEMO, "{here}/blank", *SAVE], 1, "the text is empty"),
    "standard input twice": (["read", *DEMO, "-", "-", *SAVE], 1, "once"),
    "no place to save": (["read", *DEMO, "demo", "--save", "{here}/no/x.kv"], 1, "there is no folder"),
    "a folder to save to": (["read", *DEMO, "demo", "--save", "{here}"], 1, "it is a folder"),
    "a full cache": (["read", *DEMO, "demo", "--policy", "full", *SAVE], 1, "policy full"),
    "no budget": (["read", *DEMO, "demo", "--budget", "0", *SAVE], 1, "budget is 0"),
    "no step": (["read", *DEMO, "demo", "--prefill-step-size", "0", *SAVE], 1, "prefill-step-size"),
    "nothing drawn": (["read", *DEMO, "demo", "--temp", "1", *SAVE], 2, "--temp"),
    "no question": (["ask", *DEMO, "--cache", "{kv}"], 1, "no questions"),
    "no question in a file": (["ask", *DEMO, "--cache", "{kv}", "{here}/blank"], 1, "no question in"),
    "an empty question": (["ask", *DEMO, "--cache", "{kv}", "--question", " "], 1, "--question is empty"),
    "nothing read": (["ask", *DEMO, *ASK], 1, "give --cache"),
    "two readings": (["ask", *DEMO, *ASK, "--cache", "{kv}", "--file", "demo"], 1, "one of them"),
    "ask, decided": (["ask", *DEMO, *ASK, "--cache", "{kv}", "--budget", "9"], 1, "--budget was decided"),
    "chat, decided": (["chat", *DEMO, "--cache", "{kv}", "--sinks", "2"], 1, "--sinks was decided"),
    "generate, decided": (
        ["generate", *DEMO, "--cache", "{kv}", "--prompt", "x", "--system", "s"], 1, "--system-prompt was"
    ),
    "raw, decided": (
        ["generate", *DEMO, "--cache", "{kv}", "--prompt", "x", "--raw"], 1, "--ignore-chat-template was"
    ),
    "no cache": (["ask", *DEMO, *ASK, "--cache", "{here}/latin"], 1, "safetensors"),
    "no cache there": (["chat", *DEMO, "--cache", "{here}/none"], 1, "does not exist"),
    "chat from standard input": (["chat", *DEMO, "--file", "-"], 1, "standard input"),
    "chat, no file": (["chat", *DEMO, "--file", "{here}/none"], 1, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("line, status, reason", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_one_line(notes, tmp_path, line, status, reason):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "blank").write_bytes(b" \n\n")
    result = run(*(part.format(here=tmp_path, kv=notes) for part in line), text="hi\n")
    errors = [said for said in result.stderr.splitlines() if not said.startswith("note: ")]
    assert result.exit_code == status and reason in errors[0], result.output
    assert result.stdout == "" and len(errors) == 1 and not (tmp_path / "x.kv").exists()
