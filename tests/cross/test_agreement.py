"""A model is accepted where its hooks give its own logits up to its own rounding, and only there."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import mlx_kvret
import mlx_kvret.cuda_backend.layer
import mlx_kvret.mlx_backend.reading
from mlx_kvret.core.probing import COMPARED, agrees, chunkings, ordinary_ids, probe_length
from mlx_kvret.cuda_backend.agreement import RoundedDifferently as RoundedOnTorch
from mlx_kvret.cuda_backend.api import load_model
from mlx_kvret.cuda_backend.training.student import Student as TorchStudent
from mlx_kvret.errors import UnsupportedModelError
from mlx_kvret.mlx_backend.agreement import RoundedDifferently
from mlx_kvret.mlx_backend.api import load_network
from mlx_kvret.mlx_backend.training.student import Student

from .families import stock

BACKENDS = {"mlx": mlx_kvret.mlx_backend.reading, "torch": mlx_kvret.cuda_backend.layer}


def test_tokens_of_a_probe():
    ids = ordinary_ids(49_152, 200)
    assert ids.min() >= 6_144 and ids.max() < 24_576 and len(set(ids.tolist())) > 190
    assert ordinary_ids(2, 5).max() < 2 and ordinary_ids(1, 5).max() < 1
    # more than a window, a few of a large model, never without end
    assert probe_length(100_000, [16, 512]) > 512
    assert COMPARED < probe_length(70_000_000_000, [4096]) < 30
    assert probe_length(1, [10**9]) == 1024
    for cut in chunkings(16):
        assert sum(cut) == 16 and min(cut) > 0


def test_what_counts_as_rounding():
    def never() -> float:
        raise AssertionError("measured without need")

    assert agrees(1e-5, 1e-7, never) and agrees(0.01, 0.0078, never)
    assert agrees(0.05, 0.0078, lambda: 0.02) and not agrees(0.05, 0.0078, lambda: 0.005)
    assert not agrees(0.9, 0.0078, lambda: 0.7)
    assert not agrees(float("nan"), 0.0078, lambda: 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_that_gives_something_else_is_refused(tmp_path: Path, backend: str, monkeypatch) -> None:
    stock("qwen3", "default", tmp_path)
    own = BACKENDS[backend].attend

    # wrong only once entries have left the newest ones
    def slightly_wrong(queries, view, *args, **kwargs):
        out = own(queries, view, *args, **kwargs)
        return out * 1.03 if view.pool.capacity else out

    model = mlx_kvret.detach(mlx_kvret.load(tmp_path, backend=backend)[0])
    monkeypatch.setattr(BACKENDS[backend], "attend", slightly_wrong)
    with pytest.raises(UnsupportedModelError, match=r"^qwen3 models give other logits from a bounded cache"):
        mlx_kvret.attach(model)
    monkeypatch.undo()
    mlx_kvret.attach(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_of_half_precision_are_accepted_for_use_and_training(tmp_path: Path, backend: str) -> None:
    theirs = stock("llama", "default", tmp_path)
    with torch.no_grad():
        # control tokens that half precision makes nothing of
        theirs.get_input_embeddings().weight[:16] *= 300
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    if backend == "mlx":
        mlx_kvret.load(tmp_path, backend=backend)
        assert Student(load_network(tmp_path)[0]).dtype == mx.bfloat16
    else:
        mlx_kvret.load(tmp_path, backend=backend, dtype="auto")
        assert TorchStudent(load_model(tmp_path, dtype="auto")).packs


def test_the_other_rounding_is_of_one_unit() -> None:
    keys = np.random.default_rng(0).normal(size=(1, 2, 5, 8)).astype(np.float32)
    mine, _ = RoundedDifferently().update_and_fetch(mx.array(keys), mx.array(keys))
    theirs, _ = RoundedOnTorch().update(torch.from_numpy(keys), torch.from_numpy(keys))
    for found in (np.array(mine), theirs.numpy()):
        assert 0 < abs(found / keys - 1).max() <= 2.4e-7
