"""A cache saved by one backend goes on in the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from rounding import assert_near

import mlx_kvret
import mlx_kvret.cuda_backend.snapshots as torch_snapshots
import mlx_kvret.mlx_backend.hooks as mlx_hooks
import mlx_kvret.mlx_backend.snapshots as mlx_snapshots
from mlx_kvret import demo
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.snapshot import read_snapshot, write_snapshot
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.errors import CheckpointError, ModelMismatchError, UnsupportedFeatureError

from .test_backends import IDS, Backends, kept

OPTIONS: list[dict[str, Any]] = [
    {"scope": "global"},
    {"scope": "layer", "threshold": 0.05},
    {"policy": "recent", "scope": "head"},
    {"policy": "random", "scope": "layer"},
]


def step(backends: Backends, caches: tuple[Any, Any], part: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        ours = backends.torch(torch.from_numpy(part)[None], cache=caches[0]).logits[0, -1].numpy()
    theirs = np.array(backends.mlx(mx.array(part)[None], cache=caches[1])[0, -1])
    # an angle of RoPE is rounded at the size of its position
    assert_near(ours, theirs, 2000)
    return ours


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("tokens", [0, 15, 16, 61])
def test_a_snapshot_crosses_the_backends(family: str, tokens: int, tmp_path: Path) -> None:
    backends = Backends(family, tmp_path)
    for options in OPTIONS:
        caches = backends.caches(EvictionConfig.create(**{"budget": 24, "buffer": 7} | options))
        for part in filter(len, np.split(IDS[:tokens], range(40, tokens, 13))):
            step(backends, caches, part)
        files = tmp_path / "torch.safetensors", tmp_path / "mlx.safetensors"
        write_snapshot(files[0], torch_snapshots.take(caches[0], {"from": "torch"}))
        write_snapshot(files[1], mlx_snapshots.take(caches[1], {"from": "mlx"}))
        swapped = (
            hooks.reopened_cache(backends.torch, read_snapshot(files[1])),
            mlx_hooks.reopened_cache(backends.mlx, read_snapshot(files[0])),
        )
        assert kept(swapped[0]) == kept(swapped[1]) == kept(caches[0])
        for token in IDS[tokens : tokens + 12]:
            expected = step(backends, caches, np.array([token]))
            assert_near(step(backends, swapped, np.array([token])), expected, 2000)
            assert kept(swapped[0]) == kept(swapped[1]) == kept(caches[0])


def test_the_demo_goes_on_in_the_other_backend(tmp_path: Path) -> None:
    models = {backend: mlx_kvret.load("demo", backend=backend) for backend in ("torch", "mlx")}
    text = mlx_kvret.demo.STORY.read_text()
    for source, target in (("torch", "mlx"), ("mlx", "torch")):
        model, tokenizer = models[source]
        cache = mlx_kvret.make_cache(model, 64)
        asked = text + " recall Stella"
        assert mlx_kvret.generate(model, tokenizer, asked, cache=cache, max_tokens=4) == "salmon"
        mlx_kvret.save_cache(model, cache, tmp_path / f"{source}.safetensors", {"read": "story"})
        model, tokenizer = models[target]
        cache, notes = mlx_kvret.load_cache(model, tmp_path / f"{source}.safetensors")
        assert notes == {"read": "story"}
        assert mlx_kvret.generate(model, tokenizer, " recall Ivan", cache=cache, max_tokens=4) == "copper"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    backends = Backends("llama", tmp_path)
    cache = backends.caches(EvictionConfig.create(budget=24))[0]
    taken = torch_snapshots.take(cache, {})
    assert hooks.reopened_cache(backends.torch, taken).entries == 0
    object.__setattr__(taken, "model", "hidden_size=31")
    backends.made[0].owner["model"] = "hidden_size=32"
    with pytest.raises(ModelMismatchError, match="hidden_size"):
        hooks.reopened_cache(backends.torch, taken)
    other = Backends("gemma3_text", tmp_path / "other")
    object.__setattr__(taken, "model", "gemma3_text")
    with pytest.raises(CheckpointError, match="KV heads"):
        hooks.reopened_cache(other.torch, taken)
    batch = backends.caches(EvictionConfig.create(budget=24))[0]
    with torch.no_grad():
        backends.torch(torch.from_numpy(IDS[:12]).view(2, 6), cache=batch)
    with pytest.raises(UnsupportedFeatureError, match="2 sequences"):
        torch_snapshots.take(batch, {})


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_a_snapshot_takes_the_float_type_of_the_model_that_goes_on(tmp_path, backend, saved):
    (model, tokenizer), other = (in_type(backend, dtype) for dtype in (saved, OTHER[saved]))
    cache = mlx_kvret.make_cache(model, budget=16, buffer=4)
    mlx_kvret.generate(model, tokenizer, "remember Anna amber " * 20, cache=cache, max_tokens=1)
    mlx_kvret.save_cache(model, cache, tmp_path / "a.kv")
    taken = read_snapshot(tmp_path / "a.kv")
    found, _ = mlx_kvret.load_cache(other[0], tmp_path / "a.kv")
    mlx_kvret.save_cache(other[0], found, tmp_path / "b.kv")
    went = read_snapshot(tmp_path / "b.kv")
    assert went.keys.dtype == {"float32": "BF16", "bfloat16": "F32"}[saved]
    assert (went.keys.float32() == taken.keys.cast(went.keys.dtype).float32()).all()
    assert (went.position == taken.position).all()
    assert mlx_kvret.generate(*other, "recall Anna", cache=found, max_tokens=2).split()[0] == "amber"


OTHER = {"float32": "bfloat16", "bfloat16": "float32"}


def in_type(backend, dtype):
    if backend == "torch":
        return mlx_kvret.load("demo", backend="torch", dtype=dtype)
    model, tokenizer = mlx_kvret.load("demo", backend="mlx")
    mlx_kvret.detach(model).set_dtype(getattr(mx, dtype))
    return mlx_kvret.attach(model, demo.GATES), tokenizer


def test_values_that_the_other_type_cannot_hold_are_refused(tmp_path):
    model, tokenizer = in_type("torch", "bfloat16")
    cache = mlx_kvret.make_cache(model, budget=16, buffer=4)
    mlx_kvret.generate(model, tokenizer, "remember Anna amber", cache=cache, max_tokens=1)
    mlx_kvret.save_cache(model, cache, tmp_path / "a.kv")
    taken = read_snapshot(tmp_path / "a.kv")
    large = Tensor.of(np.full(taken.keys.bits.shape, 1e30, np.float32), "BF16")
    with pytest.raises(ModelMismatchError, match="too large for the model's F16"):
        dataclasses.replace(taken, keys=large).cast("F16")
