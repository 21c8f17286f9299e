"""Whole runs on the demo model: reproducible, resumable, and stopped for good reasons only."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.core.files import whole_file
from mlx_kvret.core.tensors import Tensor, read_file, write_tensors
from mlx_kvret.cuda_backend.gates import from_checkpoint
from mlx_kvret.cuda_backend.training import engine
from mlx_kvret.cuda_backend.training.engine import train
from mlx_kvret.demo import MODEL
from mlx_kvret.errors import CheckpointError, ConfigError, DataError, TrainingError, UnsupportedModelError
from mlx_kvret.training import state
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.log import COLUMNS, read_log
from mlx_kvret.training.memory import Memory
from mlx_kvret.training.plots import plot_run
from mlx_kvret.training.records import Records
from mlx_kvret.training.report import Losses
from mlx_kvret.training.run import RunOptions

from .chats import write_chats

CONFIG = TrainConfig(
    width=16, bias=4.0, budget=4, length=64, batch=2, loss="assistant", learning_rate=1e-2, steps=6
)


def run(folder, chats, config=CONFIG, **options):
    options = {"micro_batch": 2, "save_every": 2, "recompute": False, "device": "cpu"} | options
    return train(MODEL, Records([chats]), config, RunOptions(folder, **options))


def tensors(folder):
    return {name: t.float32() for name, t in load_gates(folder / "gates").tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, chats):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder, chats) == folder / "gates"
    return folder


def test_result(finished, chats):
    checkpoint = load_gates(finished / "gates")
    assert (checkpoint.config.layers, checkpoint.config.kv_heads, checkpoint.config.training_budget) == (
        3,
        2,
        4,
    )
    checkpoint.check_model(json.loads((MODEL / "config.json").read_text()))
    assert checkpoint.provenance["settings"] == CONFIG.to_dict()
    assert checkpoint.provenance["data"][0]["name"] == chats.name
    assert checkpoint.provenance["steps"] == 6
    assert checkpoint.config.base_model == MODEL.name
    log_beta = from_checkpoint(checkpoint).log_beta(1, torch.randn(5, 64))
    assert log_beta.shape == (5, 2)
    assert (log_beta < 0).all()


def test_log_and_profile(finished):
    log = read_log(finished / "log.csv")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    # the first half of the run has slack
    assert log[0]["capacity"] < log[-1]["capacity"] < log[3]["capacity"]
    assert log[-1]["soft_size"] < log[0]["soft_size"]
    assert all(row["tokens"] == 128 and set(row) == set(COLUMNS) for row in log)
    profile = json.loads((finished / "profile.json").read_text())
    assert np.array(profile["soft_size"]).shape == (3, 2)
    assert len(profile["position"]) == len(profile["retained"]) == 64
    assert profile["retained"][-1] == pytest.approx(1)


def test_plots(finished):
    pytest.importorskip("matplotlib")
    assert plot_run(finished).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"recompute": True}])
def test_micro_batches_and_recomputation_change_rounding_only(finished, chats, tmp_path, options):
    run(tmp_path / "run", chats, **options)
    expected = tensors(finished)
    for name, found in tensors(tmp_path / "run").items():
        assert np.allclose(found, expected[name], atol=1e-4)


def test_epochs_end(chats, tmp_path):
    config = TrainConfig(**CONFIG.to_dict() | {"steps": None, "epochs": 2, "batch": 4, "kind": "rg"})
    run(tmp_path / "run", chats, config)
    log = read_log(tmp_path / "run" / "log.csv")
    assert len(log) == 6
    assert log[-1]["progress"] == 1
    assert sum(row["tokens"] for row in log) == 2 * 12 * 64


def before_step(monkeypatch, step, act):
    """Call ``act(gates)`` after the gradient of a step has been worked out."""
    inner, count = engine.gradient, 0

    def gradient(student, gates, *rest):
        nonlocal count
        losses, count = inner(student, gates, *rest), count + 1
        return (count == step and act(gates)) or losses

    monkeypatch.setattr(engine, "gradient", gradient)


def interrupt(gates):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 4, 6])
def test_goes_on_after_an_interruption(finished, chats, tmp_path, monkeypatch, step):
    before_step(monkeypatch, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", chats)
    monkeypatch.undo()
    run(tmp_path / "run", chats, resume=True)
    assert same(tensors(tmp_path / "run"), tensors(finished))
    losses = [[row["loss"] for row in read_log(at / "log.csv")] for at in (tmp_path / "run", finished)]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_changes_nothing(finished, chats):
    before = {path: path.stat().st_mtime_ns for path in (finished / "gates").iterdir()}
    assert run(finished, chats, resume=True) == finished / "gates"
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "gates").iterdir()}


COMMAND = "from mlx_kvret.cli.train import command; command()"
LONG = TrainConfig(**CONFIG.to_dict() | {"steps": 40})
OPTIONS = (
    "--width 16 --bias 4 --budget 4 --length 64 --batch 2 --loss assistant --learning-rate 0.01 --steps 40 "
    "--micro-batch 2 --save-every 3 --device cpu --no-recompute"
)


def test_a_killed_run_ends_with_the_weights_of_one_left_alone(chats, tmp_path):
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    arguments = [str(MODEL), "--data", str(chats), "--output", str(killed), *OPTIONS.split()]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    while _lines(killed / "log.csv") < 15:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "gates").exists()
    run(killed, chats, LONG, resume=True)
    run(alone, chats, LONG)
    assert same(tensors(killed), tensors(alone))
    assert len(read_log(killed / "log.csv")) == 40


def _lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_what_a_killed_writer_left_is_removed_and_nothing_else(chats, tmp_path):
    folder = tmp_path / "run"
    run(folder, chats)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with whole_file(folder / "own.safetensors") as scratch:
        mine = scratch.name
    left = mine.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    (folder / left).write_bytes(b"half")
    (folder / left.replace(".safetensors", "")).mkdir()
    others = (".git", ".env", ".training.x1.safetensors", mine)
    (folder / ".git").mkdir()
    for name in others[1:]:
        (folder / name).write_bytes(b"theirs")
    run(folder, chats, resume=True)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == sorted(others)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_with_the_last_checkpoint(finished, chats, tmp_path, monkeypatch, poison):
    def spoil(gates):
        if poison == "gradient":
            next(gates.parameters()).grad[0] = torch.nan
            return None
        return Losses(loss=math.nan, kl=math.nan, cross_entropy=1, capacity=1, soft_size=1, soft_share=1)

    before_step(monkeypatch, 4, spoil)
    with pytest.raises(TrainingError, match=r"step 4 gave no finite result .* on .*chats.jsonl:\d+.* record"):
        run(tmp_path / "run", chats)
    monkeypatch.undo()
    run(tmp_path / "run", chats, resume=True)
    assert same(tensors(tmp_path / "run"), tensors(finished))


def test_a_full_disk_keeps_the_last_checkpoint(finished, chats, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(monkeypatch, 4, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard)))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*training.safetensors.*--resume"):
            run(tmp_path / "run", chats)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    run(tmp_path / "run", chats, resume=True)
    assert same(tensors(tmp_path / "run"), tensors(finished))


def test_resume_refuses_other_settings_and_data(finished, chats, tmp_path):
    other = TrainConfig(**CONFIG.to_dict() | {"batch": 3, "learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"batch is 3, was 2; learning_rate is 0\.5, was 0\.01"):
        run(finished, chats, other, resume=True)
    more = write_chats(tmp_path / "chats.jsonl", 3, 64)
    with pytest.raises(ConfigError, match="data is"):
        run(finished, more, resume=True)


def test_refuses_folders_in_use_and_nothing_to_resume(finished, chats, tmp_path):
    with pytest.raises(ConfigError, match=r"exists already; go on with --resume"):
        run(finished, chats)
    with pytest.raises(ConfigError, match=r"no training.safetensors .* leave out --resume"):
        run(tmp_path / "run", chats, resume=True)
    assert not (tmp_path / "run").exists()


def test_refuses_a_damaged_checkpoint(finished, chats, tmp_path):
    content = (finished / state.NAME).read_bytes()
    (tmp_path / state.NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        run(tmp_path, chats, resume=True)
    (tmp_path / state.NAME).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(CheckpointError, match="is damaged"):
        run(tmp_path, chats, resume=True)


BIAS = "shared.bias"


def tensor(name, values, dtype="F32"):
    return lambda tensors, header: tensors.update({name: Tensor.of(np.asarray(values), dtype)})


def value(**fields):
    return lambda tensors, header: header["values"].update(fields)


@pytest.mark.parametrize(
    "edit",
    [
        tensor(f"gates.{BIAS}", [np.nan, 0]),
        tensor(f"gates.{BIAS}", [0, 0, 0]),
        tensor(f"gates.{BIAS}", [0, 0], "F16"),
        tensor("gates.more", [0]),
        tensor(f"mean.{BIAS}", [[0, 0]]),
        tensor(f"mean.{BIAS}", [np.inf, 0]),
        tensor(f"square.{BIAS}", [-1, 0]),
        tensor(f"square.{BIAS}", [np.nan, 0]),
        lambda tensors, header: tensors.pop(f"square.{BIAS}"),
        lambda tensors, header: tensors.pop(f"gates.{BIAS}"),
        tensor("random.torch", [0] * 5, "U8"),
        tensor("random.torch", [255] * 5056, "U8"),
        tensor("random.torch", [0.5], "F32"),
        value(step=-1),
        value(step=2.0),
        value(step=True),
        value(tokens=None),
        value(losses={"kl": 1}),
        value(losses=[1]),
        value(position=[0, 0]),
        value(position=[0, 0, 0, 2]),
        value(position=[0, -1, 0, 0]),
        value(position=[0, 10**18, 0, 0]),
        value(position="abcd"),
        lambda tensors, header: header.update(version=True),
        lambda tensors, header: header.update(values=[1]),
        lambda tensors, header: header.update(run=[1]),
    ],
)
def test_refuses_a_checkpoint_that_no_run_wrote(finished, chats, tmp_path, edit):
    """What the checksum does not tell: it is right here."""
    tensors, metadata = read_file(finished / state.NAME)
    header = json.loads(metadata["kvret-training"])
    edit(tensors, header)
    write_tensors(tmp_path / state.NAME, tensors, {"kvret-training": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"checkpoint|damaged|version"):
        run(tmp_path, chats, resume=True)


@pytest.mark.parametrize(
    "line, message",
    [
        ("1,2,3\n", r"log.csv:3 is damaged"),
        (",".join(["x"] * len(COLUMNS)) + "\n", r"log.csv:3 is damaged"),
        (",".join(["nan"] * len(COLUMNS)) + "\n", r"log.csv:3 is damaged .*finite"),
        ('"\n', r"log.csv is damaged"),
        ("1,2,3", None),
    ],
)
def test_a_damaged_log_is_named(finished, tmp_path, line, message):
    lines = (finished / "log.csv").read_text().splitlines(keepends=True)[:2]
    (tmp_path / "log.csv").write_text("".join([*lines, line]))
    if message is None:
        assert len(read_log(tmp_path / "log.csv")) == 1
    else:
        with pytest.raises(CheckpointError, match=message):
            read_log(tmp_path / "log.csv")


@pytest.mark.parametrize("option", ["micro_batch", "save_every"])
def test_refuses_options(tmp_path, option):
    with pytest.raises(ConfigError, match=f"{option} is 0; expected a whole number of at least 1"):
        RunOptions(tmp_path, **{option: 0})


def test_memory_that_fits_is_what_is_advised():
    memory = Memory(1 << 20, 5000, 300_000, 1 << 28)
    for free in (1 << 27, 1 << 30, 1 << 34):
        tokens = int(re.search(r"about ([\d,]+) tokens", memory.advice(free)).group(1).replace(",", ""))
        assert memory.needed(tokens) <= free < memory.needed(tokens + 2)
    assert "not even short" in memory.advice(1 << 21)


def test_no_free_memory(chats, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "free_bytes", lambda _: 3 << 29)
    config = TrainConfig(**CONFIG.to_dict() | {"length": 8192, "batch": 64})
    with pytest.raises(TrainingError, match=r"needs about .* GB .* about [\d,]+ tokens fit"):
        run(tmp_path / "run", chats, config, micro_batch=64)

    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(engine, "gradient", refuse)
    with pytest.raises(TrainingError, match=r"a step does not fit on cpu; about [\d,]+ tokens fit"):
        run(tmp_path / "run", chats)


def test_bad_records_met_on_the_way(chats, tmp_path):
    lines = chats.read_text().splitlines()[:4]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([*lines, json.dumps({"text": "remember Ada red"})]))
    with pytest.raises(DataError, match=r"mixed.jsonl:5 is plain text.*--skip-bad"):
        run(tmp_path / "run", path)
    records = Records([path], skip_bad=True)
    options = RunOptions(tmp_path / "other", device="cpu", recompute=False)
    train(MODEL, records, TrainConfig(**CONFIG.to_dict() | {"steps": None}), options)
    assert [message.split(" is ")[0] for message in records.skipped] == [f"{path}:5"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model_type": "unheard_of"}, UnsupportedModelError, "transformers cannot load"),
        ({"quantization": {"bits": 4}}, UnsupportedModelError, "quantised for MLX"),
        ({"max_position_embeddings": 32}, ConfigError, "length is 64 tokens, the model was made for 32"),
        ({"hidden_size": 128}, CheckpointError, "holds no whole model"),
    ],
)
def test_refuses_models(chats, tmp_path, change, error, message):
    shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        train(tmp_path / "model", Records([chats]), CONFIG, RunOptions(tmp_path / "run", device="cpu"))
    assert not (tmp_path / "run").exists()
