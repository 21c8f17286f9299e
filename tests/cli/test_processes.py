"""The command line as a process: entry points and ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(sys.executable).parent
MODULE = [sys.executable, "-m", "mlx_kvret.generate"]
ENTRIES = {
    "module": MODULE,
    "mlx_kvret.generate": [str(SCRIPTS / "mlx_kvret.generate")],
    "mlx-kvret": [str(SCRIPTS / "mlx-kvret"), "generate"],
}


def start(command, *arguments, **environment):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *arguments],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        # a shell's background jobs ignore it, and hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("command", ENTRIES.values(), ids=ENTRIES)
def test_entry_points(command):
    process = start(command, "--model", "demo", "--budget", "16")
    out, errors = process.communicate("remember Ada amber recall Ada", timeout=120)
    assert (process.returncode, out.split(), errors) == (0, ["amber"], "")


def test_an_error_is_one_line_and_status_1():
    process = start(MODULE, "--model", "demo", "--budget", "0", "--prompt", "x")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert errors.startswith("error: budget is 0") and errors.count("\n") == 1


def test_bars_of_others_stay_out_of_files():
    process = start(
        MODULE, "--model", "demo", "--budget", "16", "--prompt", "recall Ada", "--backend", "torch"
    )
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")


def wait_for_output(process):
    assert process.stdout.read(3)
    time.sleep(0.3)


def test_ctrl_c_ends_generation_with_130():
    process = start(
        MODULE, "--model", "demo", "--budget", "16", "--prompt", "the weary miller", "--max-tokens", "-1"
    )
    wait_for_output(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "Aborted" not in errors


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(tmp_path):
    process = start(
        [str(SCRIPTS / "mlx-kvret"), "chat"], "--model", "demo", "--budget", "16", "--max-tokens", "-1",
        XDG_STATE_HOME=str(tmp_path),
    )  # fmt: skip
    process.stdin.write("the weary miller\n")
    process.stdin.flush()
    assert process.stdout.read(4) == ">> w"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate("/stats\n/quit\n", timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "[stopped;" in out and "generated at" in out


COMMAND = str(SCRIPTS / "mlx-kvret")
DEMO = f"{COMMAND} generate --model demo --budget 16"
STREAMS = {
    "stdin closed": (f"{DEMO} <&-", 1, "standard input is closed"),
    "stdin closed, chat": (f"{COMMAND} chat --model demo <&-", 1, "standard input is closed"),
    "stdout closed": (f"{DEMO} --prompt x >&-", 1, "standard output is closed"),
    "stdout full": (f"{DEMO} --prompt x > /dev/full", 1, "standard output: No space left"),
    "stdout full, help": (f"{COMMAND} --help > /dev/full", 1, "standard output: No space left"),
    "stdout full, a command's help": (f"{COMMAND} info --help > /dev/full", 1, "No space left"),
    "stdout full, version": (f"{COMMAND} --version > /dev/full", 1, "No space left"),
    "latin-1 argument": (f"{DEMO} --prompt $'caf\\xe9'", 2, "UTF-8"),
    "latin-1 piped in": (f"printf 'caf\\xe9' | {DEMO}", 1, "UTF-8"),
    "a reader that goes away": (
        f"{DEMO} --prompt 'the weary miller' --max-tokens -1 | head -c 3; exit ${{PIPESTATUS[0]}}",
        1,
        "standard output: Broken pipe",
    ),
}


@pytest.mark.parametrize("line, status, reason", STREAMS.values(), ids=STREAMS)
def test_streams_that_do_not_work_are_one_line(line, status, reason):
    process = start(["bash", "-c", line])
    _, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and reason in errors


@pytest.mark.parametrize("nowhere", ["2>&-", "2> /dev/full"])
def test_nobody_listens_to_the_error(nowhere):
    process = start(["bash", "-c", f"{DEMO} --prompt x --budget 0 {nowhere}"])
    assert process.communicate(timeout=240) == ("", "") and process.returncode == 1


@pytest.mark.parametrize("command", ["generate", "chat", "info", "convert"])
@pytest.mark.parametrize("delay", [0, 0.3])
def test_ctrl_c_while_a_command_is_imported(command, delay):
    arguments = {"info": ["demo"], "convert": ["none", "out", "--to", "mlx"]}.get(
        command, ["--model", "demo"]
    )
    code = (
        "import importlib; from mlx_kvret.cli import main; real = importlib.import_module\n"
        "def told(*names): print('up', flush=True); return real(*names)\n"
        f"importlib.import_module = told; main({[command, *arguments]!r})"
    )
    process = start([sys.executable, "-c", code])
    assert process.stdout.readline() == "up\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert "Traceback" not in errors and "Exception ignored" not in errors
    if delay and command == "info":
        # it is quick: it may be done, or be ended by the signal itself while Python takes itself down
        assert process.returncode in (130, 0, -signal.SIGINT)
        return
    # what is quick may have ended before
    assert process.returncode in (130, 1)
    assert process.returncode == 130 or errors.startswith("error: ")


def test_ctrl_c_while_the_command_line_itself_is_imported():
    code = (
        "import builtins; real = builtins.__import__\n"
        "def stop(name, *rest):\n"
        "    if name == 'click': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = stop; import mlx_kvret.cli"
    )
    process = start([sys.executable, "-c", code])
    assert process.communicate(timeout=240) == ("", "") and process.returncode == 130
