"""Several processes from the command line, and what becomes of them when one is gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import mlx_kvret
from mlx_kvret.core import watch
from mlx_kvret.core.launched import launched
from mlx_kvret.errors import ConfigError, RankError

from . import torch_worker
from .processes import HERE, gloo, ring, run

STORY = "remember Anna amber. " * 3 + "Bob went home. " * 40


def test_two_read_and_one_asks(tmp_path: Path) -> None:
    """The first of two speaks and saves; what they have read goes on in one process, on the other backend."""
    text, saved = tmp_path / "story.txt", tmp_path / "story.kv"
    text.write_text(STORY)
    line = ["-m", "mlx_kvret", "read", "--model", "demo", str(text), "--budget", "32", "--save", str(saved)]
    first, second = run(line, ring(2, tmp_path))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "saved to" in first.stderr
    assert second.stdout == ""
    assert "saved" not in second.stderr
    model, _ = mlx_kvret.load("demo", backend="torch")
    alone, other = mlx_kvret.make_cache(model, budget=32), mlx_kvret.load_cache(model, saved)[0]
    assert other.seen > 100
    assert other.entries <= 36 * sum(len(layer) for layer in alone.kept_positions())


@pytest.mark.parametrize(("backend", "how"), [("mlx", "hangs"), ("torch", "dies")])
def test_a_rank_is_gone(backend: str, how: str, tmp_path: Path) -> None:
    """The other ends within the limit, with a message, and leaves no file."""
    if backend == "torch":
        torch_worker.save(tmp_path / "model")
    told = ring(2, tmp_path) if backend == "mlx" else gloo(2, tmp_path)
    start = time.monotonic()
    first, _ = run([str(HERE / "gone_worker.py"), backend, how, str(tmp_path)], told, wait=4)
    assert first.returncode not in (0, None), first.stdout
    assert "another rank is gone" in first.stderr, first.stderr
    if how == "hangs":
        assert first.returncode == watch.STATUS
        assert time.monotonic() - start < 100
    assert list(tmp_path.glob("*.kv*")) == []


def test_a_lost_connection_says_that_a_rank_is_gone() -> None:
    with pytest.raises(RankError, match="another rank is gone"), watch.watched("a pass"):
        raise RuntimeError("[ring] connection to a peer was lost")
    with pytest.raises(RuntimeError, match="something else"), watch.watched("a pass"):
        raise RuntimeError("something else")


def test_who_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "WORLD_SIZE", "RANK", "MLX_IBV_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    monkeypatch.setenv("MLX_RANK", "1")
    assert launched() is None
    monkeypatch.setenv("MLX_HOSTFILE", "hosts.json")
    assert launched().backend == "mlx"
    assert launched().rank == 1
    monkeypatch.delenv("MLX_RANK")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert launched() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched().backend == "torch"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_limit_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(watch.VARIABLE, text)
    with pytest.raises(ConfigError, match="seconds"):
        watch.limit()
