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
    assert "[stopped]" in out and "generated at" in out
