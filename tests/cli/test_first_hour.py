"""A first hour at a terminal of 60 columns: what a person types and sees, with the demo model."""

import contextlib
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from mlx_kvret import demo

COMMAND = str(Path(sys.executable).parent / "mlx-kvret")
WIDTH = 60
# what moves the cursor or colours, and what a terminal is asked or told
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>78]|\x1b\][^\x07]*\x07")
PASTE = "\x1b[200~{}\x1b[201~"


def moved(column, control):
    """Where a control sequence leaves the cursor: columns only."""
    count = int(re.sub(r"\D", "", control) or 1)
    return {"C": column + count, "D": column - count, "G": count - 1, "H": 0}.get(control[-1], column)


class Person:
    """Runs a command at a pseudo-terminal, types, and looks at every screen."""

    def __init__(self, *arguments, state):
        self.seen, self.mark = "", 0
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            environment = os.environ | {
                "TERM": "xterm", "HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(state),
                # nobody answers where the cursor is
                "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": str(WIDTH), "LINES": "40",
            }  # fmt: skip
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
            os.execve(COMMAND, [COMMAND, *arguments], environment)

    def types(self, text, enter=True):
        self.mark = len(self.seen)
        os.write(self.terminal, (text + "\r" * enter).encode())
        return self

    def sees(self, what, seconds=60):
        """Wait until a pattern, lines broken anywhere, stands behind what was typed; returns the match."""
        end, what = time.monotonic() + seconds, what.replace(" ", r"\s+")
        while (found := re.search(what, self.shown(), re.DOTALL)) is None:
            assert time.monotonic() < end, f"{what!r} is not in {self.shown()!r}"
            if not self._read(0.2) and self._ended():
                raise AssertionError(f"it ended before {what!r}: {self.shown()!r}")
        return found

    def shown(self):
        return CONTROL.sub("", self.seen[self.mark :]).replace("\r\n", "\n")

    def ends(self):
        """The status of the command, and everything that was shown checked."""
        end = time.monotonic() + 60
        while self._read(0.5):
            assert time.monotonic() < end
        _, status = os.waitpid(self.process, 0)
        os.close(self.terminal)
        self.check()
        return os.waitstatus_to_exitcode(status)

    def check(self):
        """No screen holds a traceback, and nothing was written beyond the terminal's last column."""
        assert "Traceback" not in self.seen and "fault of mlx-kvret" not in self.seen, self.shown()
        column = 0
        for place, part in enumerate(re.split(rf"({CONTROL.pattern})", self.seen)):
            if place % 2:
                column = moved(column, part)
                continue
            for character in part:
                column = {"\r": 0, "\n": column, "\b": column - 1}.get(character, column + 1)
                assert column <= WIDTH, part

    def _read(self, seconds):
        if not select.select([self.terminal], [], [], seconds)[0]:
            return not self._ended()
        with contextlib.suppress(OSError):
            if content := os.read(self.terminal, 65536):
                self.seen += content.decode(errors="replace")
                return True
        return False

    def _ended(self):
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("hour")


DEMO = ["--model", "demo", "--budget", "64"]
FILLER = "the weary miller walks past a quiet river and "


def test_a_chat(here):
    (here / "book.txt").write_text("remember Frank copper and " + FILLER * 12, "utf-8")
    me = Person("chat", *DEMO, "--max-tokens", "4000", state=here)
    me.sees(r"The cache keeps\s+up to 64 tokens\s+per head\..*>>")

    # three lines that are pasted are one message
    me.types(PASTE.format("remember Ada amber\nremember Ben iron\nrecall Ada"), enter=False)
    me.sees("recall Ada")
    me.types("").sees(r"amber\s+>>")
    me.types("/stats").sees(r"\[remembers [\d,]+ of [\d,]+ tokens, [\d.]+ MB; a full\s+cache would take")

    # an answer without end is stopped, goes on, and is taken back
    seen = int(me.types("/stats").sees(r"of ([\d,]+)\s+tokens.*>>")[1].replace(",", ""))
    me.types(FILLER).sees(r"\w+ \w+ \w+.*\w+")
    time.sleep(0.5)
    os.kill(me.process, signal.SIGINT)
    me.sees(r"\[stopped; /continue goes on\].*>>")
    me.types("/continue").sees(r"\w+ \w+ \w+")
    time.sleep(0.5)
    os.kill(me.process, signal.SIGINT)
    me.sees(r"\[stopped; /continue goes on\].*>>")
    me.types("/undo").sees(rf"\[taken back; {seen:,} tokens are read\].*>>")
    me.types("recall Ada").sees(r"amber\s+>>")
    me.types("/retry").sees(r"amber\s+>>")

    me.types(f"/save {here}/t.kv").sees(r"\[saved \d+ tokens of.*>>")
    me.types("/reset").sees(r"\[a new conversation; the cache is empty\].*>>")
    me.types(f"/load {here}/t.kv").sees(r"\[loaded \d+ tokens of.*>>")
    me.types("recall Ada").sees(r"amber\s+>>")

    me.types(f"/read {here}/book.txt").sees(r"\[read 1\d\d tokens; ask about them\].*>>")
    me.types("recall Frank").sees(r"copper\s+>>")
    me.types(f"/read {here}/none").sees(r"error: .*No such\s+file.*>>")
    me.types("/help").sees(r"/continue go on with.*ctrl-D does.*pasted into a terminal.*>>")

    # what is typed and then dropped is no message; the history brings back what was said
    me.types("nothing", enter=False).sees("nothing")
    me.types("\x03", enter=False).sees(r"ctrl-D or /quit leaves")
    me.types("line \\").sees(r"\.\.")
    me.types("recall Ada").sees(r"amber\s+>>")
    me.types("\x04", enter=False)
    assert me.ends() == 0


def test_reading_asking_and_planning(here):
    me = Person("read", *DEMO, "demo", "--save", f"{here}/story.kv", state=here)
    me.sees(r"reading .*0 of 4,09\d tokens.*read 4,09\d tokens into 0\.\d+ MB, saved")
    assert me.ends() == 0

    told = dict(re.findall(r"remember (\w+) (\w+)", demo.STORY.read_text("utf-8")))
    asked = list(told)[:10]
    (here / "asked.txt").write_text("".join(f"recall {name}\n" for name in asked), "utf-8")
    me = Person("ask", "--model", "demo", "--cache", f"{here}/story.kv", f"{here}/asked.txt", state=here)
    found = [me.sees(rf"> recall {name}\n(\w+)")[1] for name in asked]
    assert me.ends() == 0
    assert sum(answer == told[name] for name, answer in zip(asked, found, strict=True)) >= 8

    me = Person("info", f"{here}/story.kv", state=here)
    me.sees(r"kept of each part.*#+ \d+\.\d%")
    assert me.ends() == 0
    me = Person("plan", "demo", "--memory", "100MB", "--context", "8k", "--conversations", "9", state=here)
    me.sees(r"largest budget that fits 9\s+conversations: --budget\s+\d+")
    assert me.ends() == 0


def test_a_chat_that_goes_on_with_a_reading(here):
    me = Person("chat", "--model", "demo", "--cache", f"{here}/story.kv", state=here)
    me.sees(r"\[loaded 4,?09\d tokens.*>>")
    me.types("recall Stella").sees(r"salmon\s+>>")
    me.types("/quit")
    assert me.ends() == 0
