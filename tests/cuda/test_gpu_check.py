"""The check of a GPU runs tiny on a CPU, where none of the other backend's packages is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only; CI installs it")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
# as on a machine that has torch, triton and transformers, and little else
BLOCKED = ("mlx", "mlx_lm", "mlx_vlm", "openai", "gguf", "pytest", "hypothesis", "accelerate", "click")
WITHOUT = f"""
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {BLOCKED} else find(name, path, target)
PathFinder.find_spec = staticmethod(spec)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check(folder: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """The status, the lines and the page of a tiny check."""
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT), "--tiny", "--out", str(folder), *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    lines = (folder / "gpu_check.jsonl").read_text().splitlines()
    return done.returncode, [json.loads(line) for line in lines], (folder / "gpu_check.md").read_text()


@pytest.mark.parametrize("parts", [["kernels", "steps"], ["bandwidth", "decode", "first-token"]], ids=str)
def test_every_part_comes_to_its_end(tmp_path: Path, parts: list[str]) -> None:
    status, rows, page = check(tmp_path, "--together", "--parts", *parts)
    assert status == 0, rows
    assert [row["part"] for row in rows if row["what"] == "ended"] == parts
    known = {row["what"] for row in rows}
    if "kernels" in parts:
        assert {"attention", "chunks of rows", "selection", "recorded step, sliding windows"} <= known
    else:
        assert {"bounded, captured", "full, StaticCache, captured", "compactions and gates"} <= known
        assert all(row["ms"] > 0 for row in rows if "ms" in row) and "captured: full over bounded" in page


def test_a_part_that_runs_out_of_time_stops_no_other(tmp_path: Path) -> None:
    status, rows, page = check(tmp_path, "--parts", "kernels", "sanitizer", "--seconds", "20")
    # neither the kernels, compiled in 4 s, nor anything else is waited for
    assert status == 0 and {row["part"] for row in rows} == {"kernels", "sanitizer"}
    assert "Whole steps, 4B\n\n- **not run**" in page


def test_what_comes_out_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    def fails(sink: Any) -> None:
        sink.put("a table", ms=1.5)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.WORK, "kernels", fails)
    monkeypatch.setitem(gpu_check.WORK, "steps", lambda sink: sink.put("tokens", ok=False, same=False))
    options = ["--tiny", "--together", "--out", str(tmp_path), "--parts", "kernels", "steps"]
    if gpu_check.main(options) != 1:
        pytest.fail("a failing check ended well")
    page = (tmp_path / "gpu_check.md").read_text()
    assert (
        "2 checks wrong" in page
        and "no such kernel" in page
        and "ms 1.5" in page
        and "**tokens** WRONG" in page
    )
