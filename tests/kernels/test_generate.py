"""The whole MLX backend on its kernels: the same tokens, the same entries, and no waiting for the device."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from metal_host import EMULATED, installed
from mlx_lm.generate import generation_stream

import mlx_kvret
from mlx_kvret.mlx_backend import kernels
from mlx_kvret.mlx_backend.kernels.launch import Launch


@pytest.fixture
def path(monkeypatch):
    return lambda name: monkeypatch.setenv(kernels.VARIABLE, name)


def run(prompt, **options):
    """Tokens and kept positions of the demo model."""
    model, tokenizer = mlx_kvret.load("demo")
    cache = mlx_kvret.make_cache(model, **options)
    stream = mlx_kvret.stream_generate(
        model, tokenizer, prompt, cache=cache, max_tokens=24, prefill_step_size=40
    )
    return [response.token for response in stream], cache.kept_positions()


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 16, "buffer": 4},
        {"budget": 12, "buffer": 5, "scope": "head", "sinks": 2, "window": 3},
        {"budget": 12, "buffer": 5, "scope": "layer", "min_per_head": 2, "threshold": 1e-3},
        {"budget": 12, "policy": "knorm"},
        {"budget": 16, "buffer": 4, "kv_bits": "k8v4"},
        {"budget": 12, "policy": "keydiff", "kv_bits": 8},
    ],
    ids=["global", "head", "layer", "knorm", "k8v4", "keydiff in 8 bits"],
)
def test_the_demo_model_generates_the_same(path, options):
    prompt = np.random.default_rng(1).integers(2, 198, 90).tolist()
    path("reference")
    tokens, kept = run(prompt, **options)
    path("metal")
    with installed():
        tokens_again, kept_again = run(prompt, **options)
    assert tokens_again == tokens
    for layer, layer_again in zip(kept, kept_again, strict=True):
        for head, head_again in zip(layer, layer_again, strict=True):
            assert (head == head_again).all()


@pytest.mark.parametrize("bits", [16, 8, "k8v4", 4])
def test_rows_of_a_batch_generate_the_same(path, bits):
    model, tokenizer = mlx_kvret.load("demo")
    rng = np.random.default_rng(2)
    prompts = [rng.integers(2, 198, n).tolist() for n in (50, 9, 33)]

    def texts():
        options = {"budget": 12, "buffer": 4, "kv_bits": bits, "max_tokens": 12}
        return mlx_kvret.generate_batch(model, tokenizer, prompts, **options)

    path("reference")
    expected = texts()
    path("metal")
    with installed():
        assert texts() == expected


class Over(Exception):
    """Ends a trace; nothing is done with it."""


def traced(function):
    """Run ``function`` on a token that is only traced: any evaluation, any look at an array, is an error."""

    def call(token):
        function(token)
        raise Over

    mx.export_function(lambda entry: None, call, mx.array([[5]]))


@pytest.mark.skipif(not EMULATED, reason="kernels of this machine were built when they were first evaluated")
def test_a_thousand_tokens_without_waiting_for_the_device(path, monkeypatch):
    model, _ = mlx_kvret.load("demo")
    cache = mlx_kvret.make_cache(model, budget=16, buffer=50)
    path("reference")
    model(mx.array([list(range(2, 150))]), cache=cache)
    assert cache.entries == 16 * 6
    path("metal")
    launches: Counter[str] = Counter()

    def launch(self, inputs):
        launches[self.kernel.name] += 1
        return stock(self, inputs)

    stock = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(
        "mlx_kvret.mlx_backend.kernels.launch._evaluated", lambda arrays: True
    )  # the first build
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)  # does not wait, but has no place in a trace

    def decode(token):
        # as mlx-lm's loop does, which runs ahead of the device
        with mx.stream(generation_stream):
            for _ in range(1000):
                token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)

    with pytest.raises(Over):
        traced(decode)
    assert cache.seen == 148 + 1000
    assert launches["decode_attention"] == launches["merge_partials"] == 3 * 1000
    # what is due after the last token waits for the next
    assert launches["hole_filling"] == launches["tie_limit"] == 999 // 50

    with pytest.raises(ValueError, match="eval"):
        traced(lambda token: token.item())
