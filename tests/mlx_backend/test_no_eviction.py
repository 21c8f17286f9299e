"""A budget of at least the context changes nothing: logits are the stock model's."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from rounding import assert_near
from tiny import ARCHITECTURES, forward, gated, pieces, prompt, random_gates, shape_of, tiny

import mlx_kvret

TOKENS = prompt(40)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_stock_model_s(name):
    model = tiny(name)
    ways = {"one chunk": [40], "chunks": [13, 1, 9], "tokens": [20, 1]}
    expected = {}
    for way, sizes in ways.items():
        cache = make_prompt_cache(model)
        expected[way] = [forward(model, chunk, cache) for chunk in pieces(TOKENS, sizes)]

    mlx_kvret.attach(model)
    mlx_kvret.attach(model, random_gates(shape_of(model)))
    for way, sizes in ways.items():
        cache = mlx_kvret.make_cache(model, budget=30, buffer=11)  # flushes into the pool, never evicts
        for chunk, logits in zip(pieces(TOKENS, sizes), expected[way], strict=True):
            assert_near(forward(model, chunk, cache), logits, 64)
        assert cache.entries == 40 * shape_of(model).heads
        assert cache.shared.row.length < 40


@pytest.mark.parametrize("policy", ["recent", "random", "knorm", "keydiff", "full"])
def test_policies_without_gates(policy):
    model = mlx_kvret.attach(tiny())
    full = forward(model, TOKENS, mlx_kvret.make_cache(model, policy="full"))
    cache = mlx_kvret.make_cache(model, budget=40, policy=policy)
    assert_near(forward(model, TOKENS, cache), full, 64)
    assert [len(head) for layer in cache.kept_positions() for head in layer] == [40] * 4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision(dtype):
    model = tiny()
    model.set_dtype(dtype)
    chunks = pieces(TOKENS, [17, 1])
    stock = make_prompt_cache(model)
    expected = [forward(model, chunk, stock) for chunk in chunks]
    mlx_kvret.attach(model)
    mlx_kvret.attach(model, random_gates(shape_of(model)))
    cache = mlx_kvret.make_cache(model, budget=36, buffer=5)
    for chunk, logits in zip(chunks, expected, strict=True):
        assert_near(forward(model, chunk, cache), logits, 12, dtype=str(dtype).rpartition(".")[2])


def test_a_huge_budget_allocates_nothing_ahead():
    model = gated()
    cache = mlx_kvret.make_cache(model, budget=10**6)
    forward(model, TOKENS, cache)
    assert cache.nbytes < 100_000 and cache.entries == 160
