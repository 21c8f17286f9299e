"""Either backend alone is enough: the commands run where nothing of the other is installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_kvret
from mlx_kvret.core import installed
from mlx_kvret.errors import ConfigError, MissingDependencyError

ROOT = Path(__file__).parents[1]
BLOCKED = {"torch": "mlx,mlx_lm", "mlx": "torch,accelerate,triton"}


@pytest.mark.parametrize("backend", BLOCKED)
def test_the_commands_need_one_backend_only(tmp_path, backend):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "one_backend.py", tmp_path, BLOCKED[backend]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert f"backend {backend}" in said
    finished = [line.split()[1] for line in said if line.startswith("done ")]
    assert finished == ["info", "info", "convert", "convert", "generate", "eval", "train"]
    assert said[-1] == {"torch": "loaded torch", "mlx": "loaded mlx mlx_lm"}[backend]


def test_choosing_a_backend_asks_torch_only_where_there_is_a_driver(monkeypatch):
    code = (
        "import sys, mlx_kvret.api as api; from mlx_kvret.core import installed; installed.DRIVERS = ();"
        "installed.shutil.which = lambda name: None;"
        "print(api.choose_backend('auto'), api.backends()['cuda'], 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == "mlx torch sees no GPU; use backend torch for the CPU False"
    monkeypatch.setattr(installed, "DRIVERS", (sys.executable,))
    assert installed.driver_there()


def test_what_is_missing_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(installed, "_there", lambda package: package == "transformers")
    for backend, packages in (("mlx", "mlx, mlx_lm"), ("torch", "torch"), ("cuda", "torch")):
        message = rf"backend {backend}: {packages} not installed; run `pip install 'mlx-kvret\[{backend}\]'`"
        with pytest.raises(MissingDependencyError, match=message):
            mlx_kvret.load("demo", backend=backend)
    with pytest.raises(MissingDependencyError, match="no backend is installed"):
        mlx_kvret.load("demo")
    with pytest.raises(ConfigError, match="expected auto, mlx, cuda, torch"):
        mlx_kvret.load("demo", backend="jax")


def test_every_extra_that_is_named_exists():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert installed.PACKAGES.keys() <= extras.keys()
    folders = ("mlx_kvret", "cuda_backend", "converters", "examples", "benchmarks")
    sources = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    named = {
        (path.name, extra.strip())
        for path in sources
        if path.suffix in (".py", ".md")
        for group in re.findall(r"mlx-kvret\[([\w, -]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert len(named) > 3
    assert {(name, extra) for name, extra in named if extra not in extras} == set()
