"""Several processes through accelerate give what one gives."""

import subprocess
import sys

import numpy as np
import pytest

from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.cuda_backend.training.engine import train
from mlx_kvret.demo import MODEL
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.log import read_log
from mlx_kvret.training.records import Records
from mlx_kvret.training.run import RunOptions

from .chats import write_chats

CONFIG = TrainConfig(
    width=16, bias=4.0, budget=4, length=64, batch=3, loss="assistant", learning_rate=0.01, steps=4
)
OPTIONS = (
    "--width 16 --bias 4 --budget 4 --length 64 --batch 3 --loss assistant --learning-rate 0.01 --steps 4 "
    "--device cpu --no-recompute"
)


def test_two_processes_equal_one(tmp_path):
    """Three rows on two processes, one of which has two of them."""
    pytest.importorskip("accelerate")
    chats = write_chats(tmp_path / "chats.jsonl", 12, 64)
    (tmp_path / "run.py").write_text("from mlx_kvret.cli.train import command; command()")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    arguments = [
        str(tmp_path / "run.py"),
        str(MODEL),
        "--data",
        str(chats),
        "--output",
        str(tmp_path / "two"),
    ]
    run = subprocess.run(
        [sys.executable, *launch, *arguments, *OPTIONS.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("gates: ") == 1
    train(MODEL, Records([chats]), CONFIG, RunOptions(tmp_path / "one", device="cpu", recompute=False))
    one, two = (load_gates(tmp_path / name / "gates") for name in ("one", "two"))
    for name, tensor in one.tensors.items():
        assert np.allclose(two.tensors[name].float32(), tensor.float32(), atol=1e-5)
    assert one.provenance | {"last_losses": 0} == two.provenance | {"last_losses": 0}
    logs = [read_log(tmp_path / name / "log.csv") for name in ("one", "two")]
    for mine, right in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert mine["soft_size"] == pytest.approx(right["soft_size"], rel=1e-4)
