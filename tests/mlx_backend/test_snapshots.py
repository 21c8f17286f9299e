"""A cache saved and opened again goes on as if nothing had happened."""

from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from rounding import assert_near
from tiny import VOCAB, gated

import mlx_kvret
from mlx_kvret.core.snapshot import read_snapshot
from mlx_kvret.errors import CheckpointError, ModelMismatchError, UnsupportedFeatureError

OPTIONS = [
    {"budget": 8},
    {"budget": 8, "scope": "head", "buffer": 3},
    {"budget": 8, "scope": "layer", "sinks": 1, "window": 2},
    {"budget": 8, "policy": "recent"},
    {"budget": 8, "policy": "knorm"},
    {"budget": 8, "policy": "random", "policy_seed": 3},
    {"budget": 8, "scope": "head", "threshold": 0.9},
    {"budget": 500},
    {"budget": 500, "buffer": 4},
]
IDS = np.random.default_rng(1).integers(0, VOCAB, 200)


def read(model, cache, ids, chunk=7):
    for start in range(0, len(ids), chunk):
        logits = model(mx.array(ids[start : start + chunk])[None], cache=cache)
    return np.array(logits)


def same(one, other):
    heads = [chain.from_iterable(cache.kept_positions()) for cache in (one, other)]
    pairs = zip(*heads, strict=True)
    return one.seen == other.seen and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [3, 63, 70])
def test_goes_on_exactly(tmp_path, options, tokens):
    model = gated()
    cache = mlx_kvret.make_cache(model, **options)
    read(model, cache, IDS[:tokens])
    mlx_kvret.save_cache(model, cache, tmp_path / "talk", {"said": "é"})
    opened, notes = mlx_kvret.load_cache(model, tmp_path / "talk")
    assert notes == {"said": "é"} and same(cache, opened)
    for start in range(tokens, tokens + 60, 3):
        step = mx.array(IDS[start : start + 3])[None]
        assert_near(model(step, cache=opened), model(step, cache=cache), 64)
        assert same(cache, opened)


def test_empty_cache(tmp_path):
    model = gated()
    mlx_kvret.save_cache(model, mlx_kvret.make_cache(model, 8), tmp_path / "new")
    opened, _ = mlx_kvret.load_cache(model, tmp_path / "new")
    np.testing.assert_array_equal(
        read(model, opened, IDS[:50]), read(model, mlx_kvret.make_cache(model, 8), IDS[:50])
    )


@pytest.mark.parametrize("tokens", [3, 40])
def test_sliding_layers_keep_their_window(tmp_path, tokens):
    model = gated("gemma3_text")
    cache = mlx_kvret.make_cache(model, 8)
    read(model, cache, IDS[:tokens])
    mlx_kvret.save_cache(model, cache, tmp_path / "talk")
    assert len(read_snapshot(tmp_path / "talk").extras) == 2
    opened, _ = mlx_kvret.load_cache(model, tmp_path / "talk")
    for token in IDS[tokens : tokens + 30]:
        step = mx.array([[int(token)]])
        assert_near(model(step, cache=opened), model(step, cache=cache), 64)


def test_refusals(tmp_path):
    model = gated()
    cache = mlx_kvret.make_cache(model, 8)
    read(model, cache, IDS[:30])
    mlx_kvret.save_cache(model, cache, tmp_path / "talk")
    with pytest.raises(ModelMismatchError, match="gates are"):
        mlx_kvret.load_cache(gated(seed=1), tmp_path / "talk")
    with pytest.raises(ModelMismatchError, match="hidden_size"):
        mlx_kvret.load_cache(gated("qwen3", hidden_size=16), tmp_path / "talk")
    with pytest.raises(UnsupportedFeatureError, match="policy 'full'"):
        mlx_kvret.save_cache(model, mlx_kvret.make_cache(model, policy="full"), tmp_path / "full")
    with pytest.raises(UnsupportedFeatureError, match="no common file format"):
        hybrid = gated("falcon_h1")
        mlx_kvret.save_cache(hybrid, mlx_kvret.make_cache(hybrid, 8), tmp_path / "hybrid")
    whole = (tmp_path / "talk").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        mlx_kvret.load_cache(model, tmp_path / "half")
    with pytest.raises(CheckpointError, match="does not exist"):
        mlx_kvret.load_cache(model, tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "talk"]
