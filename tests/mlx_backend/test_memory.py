"""Bytes: bounded whatever the imbalance of heads, true, and independent of the prompt's length."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from tiny import prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.mlx_backend import hooks

CHUNK = 512
# MLX's allocator hands out pages of 16 KB: what the five small arrays of a pool may take more than they say
SLACK = 5 * 16_384


def model_with(bias=None, hidden_size=64):
    """A half-precision model of 2 layers, 2 KV heads of 128; ``bias`` (layers, heads) forces its gates."""
    model = tiny(head_dim=128, hidden_size=hidden_size, num_attention_heads=2)
    model.set_dtype(mx.float16)
    mlx_kvret.attach(model)
    gates = random_gates(shape_of(model), shared=False, scale=0.1 if bias else 1.0)
    for layer, values in enumerate(bias or []):
        gates.tensors[f"layers.{layer}.bias"] = Tensor.of(np.array(values, np.float32))
    mlx_kvret.attach(model, gates)
    mx.eval(model.parameters(), hooks.attachment(model).gates.parameters())
    return model


def read(model, cache, tokens):
    """One forward pass, evaluated as a decoding loop does: its logits and nothing else."""
    mx.eval(model(mx.array([tokens]), cache=cache)[:, -1].argmax())


def held():
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize(
    "scope,bias,chunks,lengths",
    [
        ("global", None, 3, None),
        ("head", None, 3, [512] * 4),
        ("global", [[14, 14], [-9, -9]], 3, [1024, 1024, 0, 0]),
        ("global", [[14, -9], [-9, -9]], 5, [2048, 0, 0, 0]),
    ],
    ids=["random", "even", "one layer takes all", "one head takes all"],
)
def test_bytes_are_bounded_and_true(scope, bias, chunks, lengths):
    # wide inputs, so that it shows if more of them are held than wait for their gate
    model, budget, buffer = model_with(bias, 1024 if bias is None else 64), 512, 64
    entry = shape_of(model).entry_bytes
    assert entry == 512
    before = held()
    cache = mlx_kvret.make_cache(model, budget=budget, buffer=buffer, scope=scope)
    bound = 1.15 * (budget + buffer) * 4 * entry
    for seed in range(chunks):
        read(model, cache, prompt(CHUNK, seed))
        assert cache.unsettled_nbytes <= bound + 1.15 * CHUNK * 4 * entry
        assert cache.nbytes <= bound
    found = [len(head) for layer in cache.kept_positions() for head in layer]
    assert lengths is None or np.abs(np.subtract(found, lengths)).max() < 16
    # a decoding loop, in which nothing but attention asks for the cache's arrays
    for token in range(70):
        read(model, cache, [token % 64])
        if token % 14 == 0:
            assert cache.nbytes <= bound
            assert held() - before == pytest.approx(cache.nbytes, abs=SLACK)


def test_peak_memory_does_not_grow_with_the_prompt():
    model, peaks = model_with(), []
    for chunks in (10, 40):
        cache = mlx_kvret.make_cache(model, budget=128, buffer=16)
        held()
        mx.reset_peak_memory()
        for start in range(chunks):
            read(model, cache, prompt(128, start))
        peaks.append(mx.get_peak_memory())
    # activations overlap by chance; a cache of all tokens would add 7.9 MB to these 2.3
    assert peaks[1] <= peaks[0] + 0.3e6


def test_a_chunk_that_is_only_partly_flushed_lets_its_memory_go():
    model = model_with()
    before = held()
    cache = mlx_kvret.make_cache(model, budget=600, buffer=16)
    read(model, cache, prompt(610))
    cache.settle()
    assert cache.shared.row.length == 10 and cache.nbytes < 630 * 4 * 512
    assert held() - before == pytest.approx(cache.nbytes, abs=SLACK)
