"""The page of mlx-lm's flags: made from both parsers, and none without a place or a reason."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_kvret.cli import habits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page():
    spec = importlib.util.spec_from_file_location("make_flags", ROOT / "docs" / "make_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_flag_of_mlx_lm_is_without_a_place_or_a_reason(page, monkeypatch):
    assert page.unaccounted() == []
    assert {"--temp", "-m", "--pipeline", "-qa"} <= page.theirs().keys()
    monkeypatch.delitem(habits.REFUSED, "--pipeline")
    assert page.unaccounted() == ["--pipeline"]
    monkeypatch.setitem(habits.REFUSED, "--no-such-flag", "it is not there")
    assert page.unaccounted() == ["--pipeline", "--no-such-flag"]


def test_the_page_is_not_stale(page, monkeypatch):
    script = [sys.executable, ROOT / "docs" / "make_flags.py", "--check"]
    done = subprocess.run(script, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setitem(habits.REFUSED, "--pipeline", "another reason")
    monkeypatch.setattr(sys, "argv", ["make_flags.py", "--check"])
    with pytest.raises(SystemExit, match="is stale; run"):
        page.main()
