"""A talk in several processes says what one says, waits for whoever types, and ends for all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_kvret.cli.company import Company
from mlx_kvret.conversation import Turn
from mlx_kvret.errors import ConfigError, RankError

from .processes import HERE, gloo, ring
from .threads import together

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


def talk(told: list[dict[str, str]], text: str, folder: Path) -> list[str]:
    """What the first process says to lines that are typed, and what the others say; all end well."""
    base = os.environ | {"MLX_KVRET_RANK_TIMEOUT": "60", "PYTHONPATH": str(HERE.parents[1])}
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
    """Commands, files that only the first one's machine needs, and mistakes."""
    (tmp_path / "story.txt").write_text(STORY)
    (expected,) = talk([{}], ASKED, tmp_path)
    for told in (ring(2, tmp_path), gloo(2, tmp_path)):
        first, second = talk(told, ASKED, tmp_path)
        assert plain(first) == plain(expected)
        assert not re.search("(?m)^(?!rank 1: error)(?!.*%\\|).+", second), second
    assert expected.count("error: ") == 3


def plain(text: str) -> list[str]:
    """Without speeds and bytes, which on several ranks are counted by arithmetic, and what loading says."""
    lines = [re.sub(r"\d[\d,.]*(/s| [kKMG]?B)", "", line) for line in text.splitlines()]
    return [line for line in lines if "%|" not in line and line.strip()]


def test_nobody_waits_long_for_one_who_types() -> None:
    """While the first one waits for a line the others hear that there is none yet; then all hear the same."""

    def typed() -> str:
        time.sleep(0.6)
        return "hello"

    def wrong() -> Any:
        raise ConfigError("no UTF-8")

    def work(ranks: Any) -> Any:
        company = Company(ranks)
        heard, rounds = company.hear(typed), ranks.rounds
        for ask in (wrong, None):
            with pytest.raises(ConfigError, match="no UTF-8"):
                company.hear(ask) if ask else company.told(wrong)
        turn = Turn("hello", [1, 2, 3], 0, 3)
        with pytest.raises(RankError, match=r"other tokens|rank 1 refuses"):
            company.agree(lambda: replace(turn, ids=[ranks.rank]))
        # a template that refuses on one of them
        with pytest.raises(RankError if ranks.rank == 0 else ConfigError, match=r"rank 1 refuses|no UTF-8"):
            company.agree(wrong if ranks.rank else lambda: turn)
        assert company.agree(lambda: turn) is turn
        return heard, rounds >= 4, company.hear(lambda: None)

    assert together(2, work) == [("hello", True, None)] * 2
