"""The examples run, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.demo import MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_reproduce(tmp_path):
    page, work = tmp_path / "retention.md", tmp_path / "work"
    command = (EXAMPLES / "reproduce.py", "--shipped-model", "--tiny", "--work", work, "--out", page)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    for heading in ("Where learned eviction loses", "Global eviction minus per head", "Ablations"):
        assert f"## {heading}" in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    for label in ("shared/1", "separate/0", "per-head/1", "no-KL/0"):
        load_gates(work / "gates" / label).check_model(json.loads((MODEL / "config.json").read_text()))
    # nothing is made again: files of gates and cells' seconds stay
    made = {path: path.stat().st_mtime_ns for path in (work / "gates").rglob("*")}
    cells = (work / "main.json").read_text()
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert page.read_text(encoding="utf-8") == text
    assert {path: path.stat().st_mtime_ns for path in (work / "gates").rglob("*")} == made
    assert (work / "main.json").read_text() == cells


def test_gates_of_another_model_are_not_shipped(tmp_path):
    done = run(EXAMPLES / "reproduce.py", "--ship", "--work", tmp_path / "work")
    assert done.returncode == 2
    assert "--ship needs --shipped-model" in done.stderr
    assert not (tmp_path / "work").exists()
