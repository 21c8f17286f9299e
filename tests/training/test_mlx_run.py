"""Whole runs on MLX: the losses of torch's, resumed exactly, on a quantised base, across backends."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.cuda_backend.training import engine as torch_engine
from mlx_kvret.demo import MODEL
from mlx_kvret.errors import ConfigError, TrainingError
from mlx_kvret.mlx_backend.gates import from_checkpoint
from mlx_kvret.mlx_backend.training import engine
from mlx_kvret.mlx_backend.training.engine import train
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.log import read_log
from mlx_kvret.training.records import Records
from mlx_kvret.training.run import RunOptions

CONFIG = TrainConfig(
    width=16, bias=1.0, budget=4, length=64, batch=2, loss="assistant", learning_rate=1e-2, steps=10
)


def run(folder, chats, model=MODEL, on=train, config=CONFIG, **options):
    options = {"micro_batch": 2, "save_every": 2, "device": "cpu"} | options
    return on(model, Records([chats]), config, RunOptions(folder, **options))


def tensors(folder):
    return {name: t.float32() for name, t in load_gates(folder / "gates").tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def stop_before_step(monkeypatch, module, step):
    """Interrupt a run where its gradient of that step would be worked out."""
    inner, count = module.gradient, 0

    def gradient(*arguments):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(module, "gradient", gradient)


def broken_off(folder, chats, monkeypatch, step, module=engine):
    stop_before_step(monkeypatch, module, step)
    with pytest.raises(KeyboardInterrupt):
        run(folder, chats, on=module.train)
    monkeypatch.undo()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, chats):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder, chats) == folder / "gates"
    return folder


def test_result(finished, chats):
    checkpoint = load_gates(finished / "gates")
    checkpoint.check_model(json.loads((MODEL / "config.json").read_text()))
    assert checkpoint.provenance["settings"] == CONFIG.to_dict()
    assert checkpoint.provenance["trained_with"].keys() == {"mlx-kvret", "mlx", "mlx-lm"}
    assert checkpoint.provenance["data"][0]["name"] == chats.name
    assert (checkpoint.provenance["steps"], checkpoint.config.training_budget) == (10, 4)
    assert mx.all(from_checkpoint(checkpoint).log_beta(1, mx.ones((5, 64))) < 0)
    profile = json.loads((finished / "profile.json").read_text())
    assert np.array(profile["soft_size"]).shape == (3, 2)
    assert profile["retained"][-1] == pytest.approx(1)
    log = read_log(finished / "log.csv")
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("step", [1, 4])
def test_goes_on_after_an_interruption(finished, chats, tmp_path, monkeypatch, step):
    broken_off(tmp_path / "run", chats, monkeypatch, step)
    run(tmp_path / "run", chats, resume=True)
    assert same(tensors(tmp_path / "run"), tensors(finished))
    losses = [[row["loss"] for row in read_log(at / "log.csv")] for at in (tmp_path / "run", finished)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"recompute": False}])
def test_micro_batches_and_recomputation_change_rounding_only(finished, chats, tmp_path, options):
    run(tmp_path / "run", chats, **options)
    for name, found in tensors(tmp_path / "run").items():
        assert np.allclose(found, tensors(finished)[name], atol=1e-4)


@pytest.mark.parametrize("begun_on, step", [(engine, 4), (torch_engine, 1), (torch_engine, 4)])
def test_ten_steps_have_the_losses_of_torch(chats, tmp_path, monkeypatch, begun_on, step):
    """Begun on one backend, and finished on both: from the same weights, and the same moments."""
    begun = broken_off(tmp_path / "begun", chats, monkeypatch, step, begun_on)
    logs = {}
    for name, module in (("mlx", engine), ("torch", torch_engine)):
        shutil.copytree(begun, tmp_path / name)
        run(tmp_path / name, chats, on=module.train, resume=True)
        logs[name] = read_log(tmp_path / name / "log.csv")
    assert [row["step"] for row in logs["mlx"]] == list(range(1, 11))
    for ours, theirs in zip(logs["mlx"], logs["torch"], strict=True):
        for column in ("loss", "kl", "cross_entropy", "capacity", "soft_size", "gradient_norm"):
            assert ours[column] == pytest.approx(theirs[column], rel=1e-3, abs=1e-5), column
        assert ours["learning_rate"] == theirs["learning_rate"]
    theirs = tensors(tmp_path / "torch")
    for name, found in tensors(tmp_path / "mlx").items():
        assert np.allclose(found, theirs[name], atol=1e-3)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_4_bit_base_trains(chats, tmp_path, dtype):
    mlx_lm.convert(str(MODEL), str(tmp_path / "base"), quantize=True, q_group_size=32, q_bits=4)
    assert "quantization" in json.loads((tmp_path / "base" / "config.json").read_text())
    config = TrainConfig(**CONFIG.to_dict() | {"dtype": dtype, "steps": 8})
    run(tmp_path / "run", chats, tmp_path / "base", config=config)
    losses = [row["loss"] for row in read_log(tmp_path / "run" / "log.csv")]
    assert losses[-1] < 0.97 * losses[0]
    # the gates are for the model that was quantised, too
    load_gates(tmp_path / "run" / "gates").check_model(json.loads((MODEL / "config.json").read_text()))


def test_refuses_devices_it_does_not_have(chats, tmp_path):
    with pytest.raises(ConfigError, match=r"no device 'cuda' for MLX; expected auto, cpu or gpu"):
        run(tmp_path / "run", chats, device="cuda")


def test_no_free_memory(chats, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "free_bytes", lambda: 3 << 18)
    with pytest.raises(TrainingError, match=r"needs about .* GB .* not even short"):
        run(tmp_path / "run", chats)
    monkeypatch.undo()

    def refuse(*_):
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr(engine, "gradient", refuse)
    with pytest.raises(TrainingError, match=r"a step does not fit in memory; about [\d,]+ tokens fit"):
        run(tmp_path / "run", chats)
