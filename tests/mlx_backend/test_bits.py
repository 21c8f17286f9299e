"""Kept entries in few bits: rounded once, when they are kept, and otherwise a cache like any other."""

import copy

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as mlx_cache
from tiny import forward, gated, prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret.core.bits import Packing, packings
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import (
    ConfigError,
    ModelMismatchError,
    UnsupportedFeatureError,
)
from mlx_kvret.mlx_backend.gates import to_tensor
from mlx_kvret.mlx_backend.packing import pack, unpack
from mlx_kvret.mlx_backend.pool import Pool

BITS = [8, "k8v4", 4]
IDS = prompt(90, 5)
POLICIES = ["learned", "knorm", "keydiff", "recent", "random"]


def wide(dtype=mx.float32, seed=0, **changes):
    """A tiny model whose heads divide into groups."""
    model = tiny("qwen3", seed, **{"head_dim": 32} | changes)
    model.set_dtype(dtype)
    return mlx_kvret.attach(model, random_gates(shape_of(mlx_kvret.attach(model)), seed))


def make(model, bits, budget=9, buffer=4, **options):
    return mlx_kvret.make_cache(model, budget=budget, buffer=buffer, kv_bits=bits, **options)


def read(model, cache, ids=IDS, sizes=(7, 1, 20, 1, 1)):
    """Logits of all tokens, read in pieces."""
    out, start = [], 0
    while start < len(ids):
        size = sizes[len(out) % len(sizes)]
        out.append(forward(model, ids[start : start + size], cache))
        start += size
    return np.concatenate(out)


def kept(cache, row=0):
    return [[head.tolist() for head in layer] for layer in cache.kept_positions(row)]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.builds(Packing, st.sampled_from([64, 192]), st.sampled_from([4, 8]), st.sampled_from([32, 64])),
    st.integers(0, 2**32 - 1),
)
def test_rows_are_those_of_core(dtype, form, seed):
    x = np.random.default_rng(seed).normal(size=(2, 3, form.width)).astype(np.float32) * 5
    x[0, 0] = 0
    x[1, 0, : form.group] = 1.5
    values = mx.array(x).astype(dtype)
    rows, flat = pack(form, values), to_tensor(values.reshape(-1, form.width))
    assert rows.shape == (2, 3, form.words(dtype.size))
    np.testing.assert_array_equal(np.array(rows).reshape(6, -1), form.pack(flat))
    again = form.unpack(form.pack(flat), flat.dtype).float32()
    found = np.array(unpack(form, rows, dtype).astype(mx.float32)).reshape(6, -1)
    np.testing.assert_array_equal(found, again)


class Rounding(Pool):
    """The naive twin: a pool of floats that rounds what is kept to what a packed one would give back."""

    bits = None

    def fill(self, slots, keys, values):
        form = packings(self.bits, keys.shape[-1], values.shape[-1])
        rounded = [self.rounded(f, a) for f, a in zip(form, (keys, values), strict=True)]
        super().fill(slots, *rounded)

    def as_kept(self, keys):
        return self.rounded(packings(self.bits, keys.shape[-1], 32)[0], keys)

    @staticmethod
    def rounded(form, array):
        tensor = to_tensor(array.reshape(-1, array.shape[-1]))
        again = form.unpack(form.pack(tensor), tensor.dtype)
        return mx.array(again.float32()).astype(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equal_to_a_pool_that_rounds(bits, policy, monkeypatch):
    model = wide()
    cache = make(model, bits, policy=policy)
    found = read(model, cache)
    monkeypatch.setattr("mlx_kvret.mlx_backend.arena.Pool", type("Own", (Rounding,), {"bits": bits}))
    monkeypatch.setattr("mlx_kvret.mlx_backend.pool.Pool", Rounding)
    naive = make(model, None, policy=policy)
    np.testing.assert_allclose(found, read(model, naive), atol=2e-5)
    assert kept(cache) == kept(naive)


def test_the_recent_window_is_exact():
    model = wide()
    full, few = (make(model, bits, budget=200, buffer=100) for bits in (None, 4))
    np.testing.assert_array_equal(read(model, few), read(model, full))
    assert few.entries == full.entries


def test_rounding_costs_little_and_bits_order_it():
    model = wide()
    whole = read(model, make(model, None, budget=40))
    loss = [np.abs(read(model, make(model, bits, budget=40)) - whole).mean() for bits in (8, 4)]
    assert 0 < loss[0] < 0.2 * loss[1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_bytes(bits, dtype):
    model = wide(dtype, num_hidden_layers=3)
    shape = shape_of(model)
    cache, plain = make(model, bits, 30, 4), make(model, None, 30, 4)
    for one in (cache, plain):
        read(model, one)
    pool = cache.shared.arena.pool
    entry = (pool.keys.nbytes + pool.values.nbytes) / pool.position.size
    assert entry == shape.kept_bytes(bits) < shape.entry_bytes
    saved = (shape.entry_bytes - entry) * pool.position.size
    assert 0.9 * saved < plain.nbytes - cache.nbytes < 1.1 * saved
    within = mlx_kvret.make_cache(model, budget="30KB", kv_bits=bits)
    assert within.shared.config.budget > mlx_kvret.make_cache(model, budget="30KB").shared.config.budget
    read(model, within, prompt(400))
    assert within.nbytes <= 30_000 * 1.15


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [3, 40, 90])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_saved_and_opened(tmp_path, bits, count, dtype):
    model = wide(dtype)
    cache = make(model, bits)
    read(model, cache, IDS[:count])
    mlx_kvret.save_cache(model, cache, tmp_path / "ours")
    mlx_cache.save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache)
    twins = [
        mlx_kvret.load_cache(model, tmp_path / "ours")[0],
        mlx_cache.load_prompt_cache(str(tmp_path / "theirs.safetensors")),
        copy.deepcopy(cache),
        cache.copy(),
    ]
    assert kept(twins[0]) == kept(twins[2]) == kept(twins[3]) == kept(cache)
    expected = forward(model, IDS[:4], cache)
    for twin in twins:
        # entries stand in another order, which sums in another order; later ones may be rounded otherwise
        found = forward(model, IDS[:4], twin)
        np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == mx.float32 else 2e-2)
    assert twins[0].shared.config.kv_bits == bits


@pytest.mark.parametrize("bits", BITS)
def test_an_empty_cache_is_saved(tmp_path, bits):
    model = wide()
    mlx_kvret.save_cache(model, make(model, bits), tmp_path / "c")
    cache, _ = mlx_kvret.load_cache(model, tmp_path / "c")
    np.testing.assert_array_equal(read(model, cache), read(model, make(model, bits)))


def test_damage_in_a_prompt_file():
    model = wide()
    cache = make(model, 8)
    read(model, cache)
    layers = [mlx_cache.BoundedKVCache.from_state(entry.state) for entry in cache]
    layers[0].arrays["pool.keys"] = Tensor.of(np.zeros((3, 2)), "U32")
    with pytest.raises(mlx_kvret.errors.CheckpointError, match="its pool has no keys of shape"):
        model(mx.array([[1]]), cache=layers)
    layers = [mlx_cache.BoundedKVCache.from_state(entry.state) for entry in cache]
    for layer in layers:
        layer.header["dtype"] = "F64"
    with pytest.raises(mlx_kvret.errors.CheckpointError, match="dtype"):
        model(mx.array([[1]]), cache=layers)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_a_batch(bits):
    model, prompts = wide(), [prompt(n, n) for n in (40, 12, 33)]
    single = [make(model, bits) for _ in prompts]
    batch = None
    for cache, ids in zip(single, prompts, strict=True):
        read(model, cache, ids)
        row = cache.copy()
        if batch is None:
            batch = row
        else:
            batch.extend(row)
    for step in range(20):
        together = np.array(model(mx.array([[step]] * 3), cache=batch)[:, 0])
        apart = [forward(model, [step], cache)[0] for cache in single]
        np.testing.assert_allclose(together, np.stack(apart), atol=2e-5)
    assert [kept(batch, row) for row in range(3)] == [kept(cache) for cache in single]
    # a copy that goes on leaves the other as it was
    before = kept(batch, 1)
    read(model, batch.row(1), IDS)
    assert kept(batch, 1) == before
    with pytest.raises(UnsupportedFeatureError, match="kv_bits"):
        batch.extend(make(model, None))


@pytest.mark.parametrize("bits", BITS)
def test_tokens_are_taken_back(bits):
    model = wide()
    cache, other = make(model, bits, buffer=12), make(model, bits, buffer=12)
    for one in (cache, other):
        read(model, one, IDS[:40])
    forward(model, [1, 2, 3], cache)
    assert [entry.trim(3) for entry in cache] == [3, 3]
    np.testing.assert_allclose(read(model, cache), read(model, other), atol=1e-5)


def test_as_an_option_everywhere():
    model = wide()
    mlx_kvret.attach(model, random_gates(shape_of(model)), budget=9, kv_bits="k8v4")
    assert model.make_cache().shared.config.kv_bits == "k8v4"
    assert mlx_kvret.make_cache(model).shared.config.kv_bits == "k8v4"
    assert mlx_kvret.make_cache(model, budget=9, kv_bits=16).shared.config.kv_bits is None
    few = [r.token for r in mlx_kvret.stream_generate(model, None, IDS, max_tokens=30, budget=30, kv_bits=8)]
    assert len(few) == 30
    assert mlx_lm.generate(model, mlx_kvret.mlx_backend.generation.TokenIds(), IDS, max_tokens=3)
    with pytest.raises(ConfigError, match="kv_bits is 5"):
        mlx_kvret.generate(model, None, IDS, kv_bits=5)
    with pytest.raises(ConfigError, match="kv_bits were decided when the cache was made"):
        mlx_kvret.generate(model, None, IDS, cache=make(model, 8), kv_bits=4)


def test_refused():
    with pytest.raises(UnsupportedFeatureError, match="heads of 8 elements"):
        make(gated(), 8)
    latent = gated("deepseek_v3", kv_lora_rank=32, qk_rope_head_dim=32, v_head_dim=32)
    with pytest.raises(UnsupportedFeatureError, match="latent attention"):
        make(latent, 8)
    with pytest.raises(UnsupportedFeatureError, match="latent attention"):
        mlx_kvret.attach(
            tiny("deepseek_v3", kv_lora_rank=32, qk_rope_head_dim=32), policy="recent", kv_bits=8
        )
    with pytest.raises(UnsupportedFeatureError, match=r"heads of 160 .* no kernel"):
        make(wide(head_dim=160), 8)
    model = wide()
    with pytest.raises(UnsupportedFeatureError, match=r"give it to mlx_kvret.attach"):
        mlx_lm.generate(
            model, mlx_kvret.mlx_backend.generation.TokenIds(), [1, 2], prompt_cache=make(model, 8), kv_bits=8
        )
    other = wide(seed=1)
    with pytest.raises(ModelMismatchError):
        forward(other, [1], make(model, 8))
