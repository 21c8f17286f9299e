"""The command line of training."""

import json
import shutil
import subprocess
import sys

import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_kvret.cli.train import command
from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.demo import MODEL
from mlx_kvret.errors import ConfigError, UnsupportedModelError

QUICK = "--width 8 --budget 4 --length 64 --batch 1 --steps 1 --device cpu"


def invoke(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_help_names_defaults_and_examples():
    text = " ".join(invoke("--help").stdout.split())
    for part in (
        "Examples:",
        "accelerate launch",
        "--skip-bad",
        "[default: 0.003; paper: 0.0002]",
        "default: shared",
    ):
        assert part in text


def test_help_needs_no_torch():
    code = "import sys; from mlx_kvret.cli.train import command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind, shared", [("rg", False), ("rg10", True)])
def test_trains(chats, tmp_path, kind, shared):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + "\n{}")
    out = invoke(
        MODEL, "--data", bad, "--output", tmp_path / "run", "--kind", kind, "--skip-bad", *QUICK.split()
    )
    assert out.exit_code == 0, out.exception
    assert f"gates: {tmp_path / 'run' / 'gates'}" in out.stdout
    assert "skipped 1 bad records, first: " in out.stderr
    checkpoint = load_gates(tmp_path / "run" / "gates")
    assert (checkpoint.config.kind, checkpoint.config.shared_projection) == (kind, shared)
    assert checkpoint.config.bias_init == 10


def test_bfloat16(chats, tmp_path):
    out = invoke("demo", "--data", chats, "--output", tmp_path / "run", "--dtype", "bfloat16", *QUICK.split())
    assert out.exit_code == 0, out.exception
    assert {t.dtype for t in load_gates(tmp_path / "run" / "gates").tensors.values()} == {"F32"}
    assert load_gates(tmp_path / "run" / "gates").config.base_model == "demo"


def test_mlx(chats, tmp_path):
    for backend in ("mlx", "torch"):
        out = invoke(
            *("demo", "--data", chats, "--output", tmp_path / backend, "--backend", backend, *QUICK.split())
        )
        assert out.exit_code == 0, out.exception
        versions = load_gates(tmp_path / backend / "gates").provenance["trained_with"]
        assert backend in versions


def test_a_model_quantised_for_mlx_is_trained_there(chats, tmp_path):
    mlx_lm.convert(str(MODEL), str(tmp_path / "base"), quantize=True, q_group_size=32, q_bits=4)
    out = invoke(tmp_path / "base", "--data", chats, "--output", tmp_path / "run", *QUICK.split())
    assert out.exit_code == 0, out.exception
    out = invoke(tmp_path / "base", "--data", chats, "--output", tmp_path / "2", "--backend", "torch")
    assert isinstance(out.exception, UnsupportedModelError)
    assert "--backend mlx" in str(out.exception)


def test_mlx_is_one_process(chats, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = invoke("demo", "--data", chats, "--output", tmp_path / "run", "--backend", "mlx", *QUICK.split())
    assert isinstance(out.exception, ConfigError)
    assert "one process" in str(out.exception)


def test_errors_are_ours(chats, tmp_path):
    out = invoke(MODEL, "--data", chats, "--output", tmp_path / "run", "--length", 1 << 20)
    assert isinstance(out.exception, ConfigError)
    assert "made for 8192" in str(out.exception)


def test_without_matplotlib_it_says_so(chats, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = invoke(MODEL, "--data", chats, "--output", tmp_path / "run", *QUICK.split())
    assert out.exit_code == 0, out.exception
    assert "no plots: plots need matplotlib" in out.stderr
    assert json.loads((tmp_path / "run" / "profile.json").read_text())["soft_size"]


def test_a_run_that_is_not_over_gives_gates(chats, tmp_path):
    run = tmp_path / "run"
    out = invoke("demo", "--data", chats, "--output", run, *QUICK.split())
    assert out.exit_code == 0, out.exception
    shutil.rmtree(run / "gates")
    out = invoke("--output", run, "--export", tmp_path / "now")
    assert out.exit_code == 0, out.exception
    assert "gates after step 1" in out.stdout
    checkpoint = load_gates(tmp_path / "now")
    assert checkpoint.provenance["unfinished"]
    assert checkpoint.config.base_model == "demo"
    out = invoke("--output", tmp_path / "nothing", "--export", tmp_path / "other")
    assert isinstance(out.exception, ConfigError)


def test_only_a_model_is_needed(tmp_path):
    out = invoke(
        "demo", "--data", "self", "--self-records", "3", "--output", tmp_path / "run", *QUICK.split()
    )
    assert out.exit_code == 0, out.exception
    assert len((tmp_path / "run-own-words.jsonl").read_text().splitlines()) == 3
    assert "100.0% step 1 KL" in out.stderr


def test_presets(chats, tmp_path):
    out = invoke(
        *("demo", "--data", chats, "--output", tmp_path / "run", "--preset", "paper", "--bias", "12"),
        *QUICK.split(),
    )
    assert out.exit_code == 0, out.exception
    settings = load_gates(tmp_path / "run" / "gates").provenance["settings"]
    assert (settings["bias"], settings["learning_rate"], settings["length"]) == (12, 2e-4, 64)
