"""A talk in several processes says what one says, waits for whoever types, and ends for all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .processes import HERE, gloo, ring

STORY = "remember Anna amber. " * 3 + "Bob went home. " * 40
ASKED = """/read story.txt
recall Anna
/stats
/undo
/retry
/read nowhere.txt
recall Anna
/continue
/save talk.kv
/load nowhere.kv
/reset
/load talk.kv
recall Anna
/stats
"""


def talk(told: list[dict[str, str]], text: str, folder: Path, wait: float, pause: float) -> list[str]:
    """What the first process says to lines that are typed, and what the others say; all end well."""
    base = os.environ | {"MLX_KVRET_RANK_TIMEOUT": str(wait), "PYTHONPATH": str(HERE.parents[1])}
    line = [
        sys.executable,
        "-m",
        "mlx_kvret",
        "chat",
        "--model",
        "demo",
        "--budget",
        "24",
        "--max-tokens",
        "9",
    ]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(line, env=base | own, cwd=folder, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
        for own in told
    ]
    try:
        while "Commands" not in (said := processes[0].stderr.readline()):
            assert said
        time.sleep(pause)
        for process in processes[1:]:
            process.stdin.close()
            process.stdin = None
        done = [processes[0].communicate(text, timeout=120)]
        done += [process.communicate(timeout=60) for process in processes[1:]]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(told), done
    return [out + error for out, error in done]


def test_as_one_process(tmp_path: Path) -> None:
    """Commands, files that only the first one's machine needs, mistakes, and a pause beyond the limit."""
    (tmp_path / "story.txt").write_text(STORY)
    (expected,) = talk([{}], ASKED, tmp_path, 60, 0)
    for told in (ring(2, tmp_path), gloo(2, tmp_path)):
        first, second = talk(told, ASKED, tmp_path, 3, 5)
        assert plain(first) == plain(expected)
        assert not re.search("(?m)^(?!rank 1: error)(?!.*%\\|).+", second), second
    assert expected.count("error: ") == 3


def plain(text: str) -> list[str]:
    """Without speeds and bytes, which on several ranks are counted by arithmetic, and what loading says."""
    lines = [re.sub(r"\d[\d,.]*(/s| [kKMG]?B)", "", line) for line in text.splitlines()]
    return [line for line in lines if "%|" not in line and line.strip()]
