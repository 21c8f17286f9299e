"""Bad command lines: each ends in one line on stderr that says why, and a status; never in a traceback."""

import json
import os
import shutil

import pytest
from click.testing import CliRunner

from mlx_kvret import demo
from mlx_kvret.cli import main

ASK = ["--prompt", "recall Ada"]
GENERATE, CHAT = ["generate", "--model", "demo"], ["chat", "--model", "demo"]
CONVERT = ["convert", "--to", "mlx", str(demo.GATES)]
TRAIN = ["train", "demo", "--output", "{here}/run"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder full of things that are not what they seem."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    (folder / "empty").write_bytes(b"")
    (folder / "blank").write_bytes(b" \n\n")
    (folder / "latin").write_bytes(b"caf\xe9 au lait")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "half").write_bytes(b"recall Ada \xe2\x82")
    (folder / "text").write_text("the weary miller")
    (folder / "jsonl").write_text('{"text": 7}\n')
    (folder / "bad\x1b[31mred").mkdir()
    (folder / "bad\x1b[31mred" / "config.json").write_text("{")
    os.symlink("loop", folder / "loop")

    def model(name, **files):
        shutil.copytree(demo.MODEL, folder / name)
        for file, content in files.items():
            (folder / name / file.replace("__", ".")).write_bytes(content)

    model("list", config__json=b"[]")
    model("cut", config__json=b'{"model_type": "qw')
    model("odd", config__json=json.dumps({"model_type": "\x1b]0;x\x07odd"}).encode())
    model("weights", model__safetensors=b"\0" * 64)
    model("tokens", tokenizer__json=b"{}")
    model("letters", tokenizer__json=b"caf\xe9")
    model("template", chat_template__jinja=b"{% if %}")
    model("angry", chat_template__jinja=b"{{ raise_exception('no \x1b[2J\nway') }}")
    shutil.copytree(demo.GATES, folder / "gates")
    (folder / "gates" / "gates.safetensors").write_bytes(b"\xff" * 99)
    shutil.copytree(demo.GATES, folder / "numbers")
    (folder / "numbers" / "kvret.json").write_text('{"format": 1e999}')
    return folder


LINES = {
    # what click finds
    "no such command": (["frobnicate"], "frobnicate"),
    "no such option": ([*GENERATE, "--bugdet", "4"], "--bugdet"),
    "an option without its value": ([*GENERATE, "--prompt"], "--prompt"),
    "no model": (["generate", *ASK], "--model"),
    "no number": ([*GENERATE, *ASK, "--max-tokens", "many"], "many"),
    "no choice": ([*GENERATE, *ASK, "--policy", "best"], "best"),
    "no backend": ([*CHAT, "--backend", "tpu"], "tpu"),
    "too much": ([*GENERATE, *ASK, "more"], "more"),
    "no destination": (["convert", "{here}/gates"], "DST"),
    "no form": (["convert", "{here}/gates", "{here}/out"], "--to"),
    "no name": (["info"], "NAME"),
    "no output": (["train", "demo"], "--output"),
    # bytes that are no text
    "latin-1 prompt": ([*GENERATE, "--prompt", "caf\udce9"], "UTF-8"),
    "latin-1 system": ([*CHAT, "--system-prompt", "caf\udce9"], "UTF-8"),
    "latin-1 model": (["info", "caf\udce9"], "UTF-8"),
    "latin-1 file name": ([*GENERATE, "--file", "caf\udce9"], "UTF-8"),
    "latin-1 file": ([*GENERATE, "--file", "{here}/latin"], "UTF-8"),
    "half a character": ([*GENERATE, "--file", "{here}/half"], "UTF-8"),
    "binary file": ([*GENERATE, "--file", "{here}/binary"], "zero byte"),
    "endless file": ([*GENERATE, "--file", "/dev/zero"], "zero byte"),
    "latin-1 prompt file": ([*CONVERT, "{here}/o", "--prompt-file", "{here}/latin"], "UTF-8"),
    # things that are not what they should be
    "no file": ([*GENERATE, "--file", "{here}/none"], "No such file"),
    "folder for a file": ([*GENERATE, "--file", "{here}/folder"], "directory"),
    "file for a folder": ([*GENERATE, "--file", "{here}/text/x"], "directory"),
    "a loop of links": ([*GENERATE, "--file", "{here}/loop"], "cannot read"),
    "a zero in a name": ([*GENERATE, "--file", "a\0b"], "null"),
    "a long name": ([*GENERATE, "--file", "n" * 5000], "too long"),
    "a stranger's home": ([*GENERATE, "--file", "~nobody-there/x"], "cannot read"),
    "empty file": ([*GENERATE, "--file", "{here}/empty"], "empty"),
    "blank file": ([*GENERATE, "--file", "{here}/blank"], "empty"),
    "no prompt file": ([*CONVERT, "{here}/o", "--prompt-file", "{here}/none"], "cannot read"),
    "folder for a prompt": ([*CONVERT, "{here}/o", "--prompt-file", "{here}"], "directory"),
    # models
    "no model folder": (["chat", "--model", "{here}/none"], "there is no folder"),
    "a file for a model": (["info", "{here}/text"], "not a whole safetensors file"),
    "an empty folder": (["info", "{here}/folder"], "neither a model"),
    "an empty model": (["generate", "--model", "{here}/folder", *ASK], "config.json"),
    "a config that is a list": (["generate", "--model", "{here}/list", *ASK], "config.json"),
    "half a config": (["chat", "--model", "{here}/cut"], "config.json"),
    "a config's escapes": (["info", "{here}/odd"], "odd"),
    "a folder's escapes": (["info", "{here}/bad\x1b[31mred"], "red"),
    "damaged weights": (["generate", "--model", "{here}/weights", *ASK], "weights"),
    "damaged tokenizer": (["generate", "--model", "{here}/tokens", *ASK], "tokenizer"),
    "a tokenizer that is no text": (["chat", "--model", "{here}/letters"], "tokenizer"),
    "broken template": (["chat", "--model", "{here}/template", "--policy", "recent"], "chat template"),
    "angry template": (["generate", "--model", "{here}/angry", *ASK], "chat template"),
    "a system message without a template": (
        [*GENERATE, *ASK, "--system-prompt", "be", "--ignore-chat-template"], "--system-prompt",
    ),
    # gates
    "no gates": ([*GENERATE, *ASK, "--gates", "{here}/none"], "{here}/none"),
    "no gates in the folder": ([*GENERATE, *ASK, "--gates", "{here}/folder"], "folder"),
    "damaged gates": ([*CHAT, "--gates", "{here}/gates"], "gates"),
    "damaged gates, shown": (["info", "{here}/gates"], "gates"),
    "gates of endless numbers": (["info", "{here}/numbers"], "kvret.json"),
    "gates to convert": (["convert", "{here}/folder", "{here}/out", "--to", "shared"], "folder"),
    "a destination that is taken": ([*CONVERT, "{here}/text"], "exists already"),
    "a destination without a parent": ([*CONVERT, "{here}/text/out"], "text"),
    "bits without their form": ([*CONVERT, "{here}/out", "--bits", "7"], "bits"),
    # numbers
    "budget of nothing": ([*CHAT, "--budget", "0"], "budget is 0"),
    "budget of words": (["info", "demo", "--budget", "lots"], "budget 'lots'"),
    "endless digits": ([*GENERATE, *ASK, "--budget", "9" * 5000], "budget"),
    "context of nothing": (["info", "demo", "--context", "0"], "--context"),
    "chunk of nothing": ([*GENERATE, *ASK, "--prefill-step-size", "0"], "--prefill-step-size"),
    "no tokens": ([*GENERATE, *ASK, "--max-tokens", "0"], "max_tokens"),
    "nan": ([*GENERATE, *ASK, "--temp", "nan"], "temp"),
    # training and evaluation end in the same place
    "no training data": ([*TRAIN, "--data", "{here}/none"], "none"),
    "binary training data": ([*TRAIN, "--data", "{here}/binary"], "binary"),
    "records that are none": ([*TRAIN, "--data", "{here}/jsonl"], "jsonl"),
    "no task": (["eval", "--model", "demo", "--task", "nonsense"], "nonsense"),
    "no method": (["eval", "--model", "demo", "--method", "nonsense"], "nonsense"),
    "results that are none": (["eval", "--model", "demo", "--out", "{here}/text"], "text"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, reason", LINES.values(), ids=LINES)
def test_one_line_and_a_status(here, monkeypatch, arguments, reason):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [argument.replace("{here}", str(here)) for argument in arguments]
    reason = reason.replace("{here}", str(here))
    result = CliRunner().invoke(main, arguments, input="")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code in (1, 2), result.output
    assert lines == result.stderr.splitlines()[-1:], result.stderr
    assert reason in lines[0] and "Traceback" not in result.output and "a fault of mlx-kvret" not in lines[0]
    assert all(character.isprintable() for character in lines[0])


PIPED = {
    "nothing": (b"", "empty"),
    "latin-1": (b"caf\xe9", "UTF-8"),
    "binary": (bytes(range(256)), "zero byte"),
    "blank": (b" \n ", "empty"),
}


@pytest.mark.parametrize("content, reason", PIPED.values(), ids=PIPED)
def test_what_is_piped_in(content, reason):
    result = CliRunner().invoke(main, GENERATE, input=content)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert reason in result.stderr


@pytest.mark.parametrize(
    "error, reason",
    [
        (MemoryError("12 GB"), "out of memory"),
        (RecursionError("deep"), "nested too deep"),
        (OSError(28, "No space left on device", "x\x1b[2Jy"), "No space left on device"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), "UTF-8"),
        (ImportError("libmlx.so"), "install it again"),
        (KeyError("\x1b[31mx"), "a fault of mlx-kvret"),
        (BaseException("a panic\nin two lines"), "a panic in two lines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_nobody_expected(monkeypatch, error, reason):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("mlx_kvret.api.load", fails)
    result = CliRunner().invoke(main, [*GENERATE, *ASK])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and reason in result.stderr
    assert result.stderr.startswith("error: ") and "\x1b" not in result.stderr
    monkeypatch.setenv("MLX_KVRET_TRACEBACK", "1")
    assert "Traceback" in CliRunner().invoke(main, [*GENERATE, *ASK]).stderr


def test_interrupted(monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_kvret.api.load", fails)
    result = CliRunner().invoke(main, [*GENERATE, *ASK])
    assert result.exit_code == 130 and result.stderr.strip() == ""


def test_what_a_model_says_is_no_terminal_command(monkeypatch):
    from types import SimpleNamespace

    text = "a\tb\n\x1b[2J\x9b31m👩‍💻"

    def says(*_, **__):
        yield SimpleNamespace(text=text, token=1, finish_reason="length")

    monkeypatch.setattr("mlx_kvret.api.stream_generate", says)
    # a chat puts its words together from tokens
    words = SimpleNamespace(add=lambda token: text, end=lambda: "")
    monkeypatch.setattr("mlx_kvret.cli.talk.Detokenizer", lambda decode: words)
    for result in (CliRunner().invoke(main, [*GENERATE, *ASK]), CliRunner().invoke(main, CHAT, input="hi\n")):
        assert "a\tb\n\\x1b[2J\\x9b31m👩‍💻" in result.stdout and not set("\x1b\x9b") & set(result.stdout)


def test_a_terminal_of_few_characters(monkeypatch):
    from types import SimpleNamespace

    def says(*_, **__):
        yield SimpleNamespace(text="λ = é", token=1, finish_reason="stop")

    monkeypatch.setattr("mlx_kvret.api.stream_generate", says)
    result = CliRunner(charset="latin-1").invoke(main, [*GENERATE, *ASK])
    assert (result.exit_code, result.stdout_bytes) == (0, b"\\u03bb = \xe9\n")
