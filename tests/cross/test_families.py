"""Families and kinds of RoPE against transformers; ``benchmarks/reliability/families.py`` walks all."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import mlx_lm.utils
import numpy as np
import pytest
import torch
from transformers import DynamicCache

import mlx_kvret
from mlx_kvret.errors import UnsupportedModelError
from mlx_kvret.mlx_backend import hooks
from mlx_kvret.mlx_backend.rotation import FixedRoPE

from .families import LENGTH, stock

IDS = np.random.default_rng(0).integers(1, 128, (1, LENGTH))
LONG = np.random.default_rng(1).integers(1, 128, (1, 300))
# a family for each way in which mlx-lm's files read RoPE: not at all, in part, by layer, interleaved, latent
CELLS = [
    ("qwen2", "yarn, own scale"), ("qwen3", "llama3"), ("llama", "linear"), ("mistral", "longrope"),
    ("phi3", "partial"), ("phi3", "longrope"), ("glm", "partial"), ("glm4", "linear"), ("nemotron", "llama3"),
    ("gemma3_text", "linear"), ("gemma3_text", "yarn"), ("olmo3", "yarn, own scale"), ("cohere", "longrope"),
    ("helium", "yarn"), ("starcoder2", "linear"), ("smollm3", "default"), ("ernie4_5", "llama3"),
    ("deepseek_v3", "yarn"), ("deepseek_v3", "longrope"), ("exaone4", "llama3"), ("granite", "dynamic"),
    ("phi", "partial"), ("falcon_h1", "linear"), ("qwen3_next", "partial"), ("laguna", "yarn"),
]  # fmt: skip
FAMILIES = sorted({family for family, _ in CELLS})


def logits(model, ids, cache, sizes):
    parts = np.split(ids, np.cumsum(sizes)[:-1], 1)
    return np.concatenate(
        [np.array(model(mx.array(part), cache=cache)[0].astype(mx.float32)) for part in parts]
    )


def load(folder, kind="default", backend="mlx"):
    length = {"rope_length": LENGTH} if kind in ("longrope", "dynamic") else {}
    return mlx_kvret.load(folder, backend=backend, **length)[0]


@pytest.mark.parametrize("family,kind", CELLS)
def test_positions_are_transformers_own(tmp_path: Path, family: str, kind: str) -> None:
    with torch.no_grad():
        expected = stock(family, kind, tmp_path)(torch.from_numpy(IDS)).logits[0].numpy()
    model = load(tmp_path, kind)
    found = logits(model, IDS, mlx_kvret.make_cache(model, budget=64, policy="recent"), [20, 20, 1, 7])
    # gemma and starcoder2 compute gelu by another formula
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4 * abs(expected).max())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_setting_that_a_family_ignores_is_refused_by_name(tmp_path: Path, family: str) -> None:
    stock(family, "partial", tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"^{family} models with the RoPE setting partial_rotary"):
        load(tmp_path)


def test_older_names_of_the_settings_are_read_as_well(tmp_path: Path) -> None:
    with torch.no_grad():
        expected = stock("starcoder2", "linear", tmp_path)(torch.from_numpy(IDS)).logits[0].numpy()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    own = config.pop("rope_parameters")
    config |= {"rope_theta": own["rope_theta"], "rope_scaling": {"type": "linear", "factor": own["factor"]}}
    path.write_text(json.dumps(config))
    model = load(tmp_path)
    found = np.array(model(mx.array(IDS))[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4 * abs(expected).max())
    # what mlx-lm opens by itself is another model, and is not taken
    with pytest.raises(UnsupportedModelError, match=r"mlx_kvret\.load"):
        wrong, _ = mlx_lm.utils.load_model(tmp_path, model_config={"partial_rotary_factor": 0.5})
        wrong.args.rope_scaling = config["rope_scaling"]
        mlx_kvret.attach(wrong)


def test_a_mended_model_stays_so(tmp_path: Path) -> None:
    stock("glm", "partial", tmp_path)
    model = load(tmp_path)
    assert all(isinstance(layer.self_attn.rope, FixedRoPE) for layer in model.layers)
    expected = np.array(model(mx.array(IDS))[0])
    mlx_kvret.attach(mlx_kvret.detach(model))
    np.testing.assert_array_equal(np.array(model(mx.array(IDS))[0]), expected)
    # opened elsewhere it rotates whole heads, and its arguments do not say that it should not
    with pytest.raises(UnsupportedModelError, match="glm models with the RoPE settings"):
        mlx_kvret.attach(mlx_lm.utils.load_model(tmp_path)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_many_tokens_in_chunks_on_mlx(tmp_path: Path, family: str) -> None:
    stock(family, "default", tmp_path)
    model = load(tmp_path)
    sizes = [100, 90, 1, 1, 60, 48]
    mlx_kvret.detach(model)
    expected = logits(model, LONG, mlx_cache.make_prompt_cache(model), [300])
    mlx_kvret.attach(model)
    whole = mlx_kvret.make_cache(model, budget=320, buffer=32, policy="recent")
    np.testing.assert_allclose(
        logits(model, LONG, whole, sizes), expected, rtol=0, atol=1e-4 * abs(expected).max()
    )
    small = mlx_kvret.make_cache(model, budget=24, buffer=8, policy="keydiff")
    heads = hooks.attachment(model).layout.shape.heads
    for part in np.split(LONG, np.cumsum(sizes)[:-1], 1):
        assert np.isfinite(np.array(model(mx.array(part), cache=small)[0].astype(mx.float32))).all()
        assert small.entries <= 32 * heads


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3_text", "olmo3", "glm", "granite", "exaone4"])
def test_many_tokens_in_chunks_on_torch(tmp_path: Path, family: str) -> None:
    theirs = stock(family, "default", tmp_path)
    ids, sizes = torch.from_numpy(LONG), [100, 90, 1, 1, 60, 48]
    with torch.no_grad():
        expected = theirs(ids, cache=DynamicCache(config=theirs.config)).logits
        model = load(tmp_path, backend="torch")
        whole = mlx_kvret.make_cache(model, budget=320, buffer=32, policy="recent")
        found = torch.cat([model(part, cache=whole).logits for part in ids.split(sizes, 1)], 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        small = mlx_kvret.make_cache(model, budget=24, buffer=8, policy="keydiff")
        for part in ids.split(sizes, 1):
            assert model(part, cache=small).logits.isfinite().all()
            assert small.entries <= 32 * 2 * len(small.competing)
