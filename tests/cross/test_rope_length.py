"""RoPE whose frequencies depend on the length of the text is fixed for the life of a cache."""

from __future__ import annotations

import copy
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import mlx_kvret
from mlx_kvret.errors import ConfigError, ModelMismatchError, UnsupportedModelError

from .families import stock

# the original length of the tiny models is 16
IDS = np.random.default_rng(0).integers(1, 128, (1, 10))


def forward(model, ids, cache=None):
    if hasattr(model, "config"):
        with torch.no_grad():
            given = {} if cache is None else {"cache": cache}
            return model(torch.from_numpy(ids), **given).logits[0].numpy()
    return np.array(model(mx.array(ids), cache=cache)[0])


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("family", ["phi3", "qwen3"])
def test_longrope_is_fixed(tmp_path: Path, family: str, backend: str) -> None:
    theirs = stock(family, "longrope", tmp_path)
    model, _ = mlx_kvret.load(tmp_path, backend=backend)
    ids = np.concatenate([IDS, IDS, IDS], 1)
    # longer than the original length, transformers uses the same frequencies
    expected = forward(theirs, ids)
    cache = mlx_kvret.make_cache(model, budget=64, policy="recent")
    found = np.concatenate([forward(model, part, cache) for part in np.split(ids, [7, 12, 13, 20], 1)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
    short, _ = mlx_kvret.load(tmp_path, backend=backend, rope_length=16)
    np.testing.assert_allclose(
        forward(short, IDS), forward(theirs, IDS), rtol=0, atol=1e-5 * abs(expected).max()
    )
    # keys of one kind mean nothing to the other
    path = tmp_path / "cache"
    mlx_kvret.save_cache(model, cache, path)
    assert mlx_kvret.load_cache(model, path)[0].seen == 30
    with pytest.raises(ModelMismatchError, match="rope_length"):
        mlx_kvret.load_cache(short, path)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_dynamic_needs_a_length(tmp_path: Path, backend: str) -> None:
    theirs = stock("qwen3", "dynamic", tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"^qwen3 models with rope_type dynamic.*rope_length=N"):
        mlx_kvret.load(tmp_path, backend=backend)
    model, _ = mlx_kvret.load(tmp_path, backend=backend, rope_length=10_000)
    usual = mlx_kvret.load(tmp_path, backend=backend, rope_length=100)[0]
    np.testing.assert_allclose(forward(usual, IDS), forward(theirs, IDS), rtol=0, atol=1e-5)
    assert abs(forward(model, IDS) - forward(usual, IDS)).max() > 1e-3


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_length_that_means_nothing_is_refused(tmp_path: Path, backend: str) -> None:
    stock("qwen3", "yarn", tmp_path)
    with pytest.raises(ConfigError, match="rope_length has no effect"):
        mlx_kvret.load(tmp_path, backend=backend, rope_length=100)


def test_generating_across_the_original_length_keeps_the_cache(tmp_path: Path) -> None:
    stock("phi3", "longrope", tmp_path)
    model, _ = mlx_kvret.load(tmp_path, backend="torch")
    cache = mlx_kvret.make_cache(model, budget=64, policy="recent")
    out = model.generate(torch.from_numpy(IDS), cache=cache, max_new_tokens=20, do_sample=False)
    assert out.shape[1] == 30 and cache.seen >= 29
    ids = torch.from_numpy(IDS)
    for _ in range(20):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_detaching_gives_the_model_its_own_ways_back(tmp_path: Path) -> None:
    theirs = stock("phi3", "longrope", tmp_path)
    model, _ = mlx_kvret.load(tmp_path, backend="torch")
    twin = copy.deepcopy(model)
    fixed = forward(model, IDS)
    np.testing.assert_array_equal(forward(mlx_kvret.detach(twin), IDS), forward(theirs, IDS))
    assert "prepare_inputs_for_generation" not in vars(twin)
    # the model it was copied from stays as it was
    np.testing.assert_array_equal(forward(model, IDS), fixed)
    assert abs(fixed - forward(theirs, IDS)).max() > 1e-3
