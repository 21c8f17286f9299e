"""Budgets as memory: parsing, and the largest budget that fits, against counting up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.budget import CacheShape, parse_budget, tokens_within
from mlx_kvret.errors import ConfigError

QWEN3_4B = CacheShape(36, 8, 128, 128, 2, 2560)
shapes = st.builds(
    CacheShape,
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 64), st.integers(1, 64),
    st.sampled_from([2, 4]), st.integers(1, 512),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "tokens", "size"),
    [
        (1024, 1024, None),
        ("1024", 1024, None),
        (" 1 ", 1, None),
        ("256MB", None, 256_000_000),
        ("256 mb", None, 256_000_000),
        ("1.5GiB", None, 3 * 2**29),
        ("0.5kib", None, 512),
        ("7KB", None, 7000),
        ("2GB", None, 2 * 10**9),
        ("3MiB", None, 3 * 2**20),
        ("99B", None, 99),
        (np.int64(64), 64, None),
        (10**30, 10**30, None),
    ],
)
def test_parse(text, tokens, size):
    assert parse_budget(text) == (tokens, size)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "neither tokens per head"),
        ("lots", "neither tokens per head"),
        ("12TB", "neither tokens per head"),
        ("1e3", "neither tokens per head"),
        ("1 024", "neither tokens per head"),
        (None, "neither tokens per head"),
        (True, "neither tokens per head"),
        ("9" * 5000, "neither tokens per head"),
        ("9" * 400 + "GB", "neither tokens per head"),
        ("1e400", "neither tokens per head"),
        ("nan", "neither tokens per head"),
        (b"64", "neither tokens per head"),
        ([64], "neither tokens per head"),
        (float("inf"), "neither tokens per head"),
        pytest.param(-(10**5000), "neither tokens per head", id="digits"),
        (12.5, "no whole number of tokens"),
        ("64.0", "no whole number of tokens"),
        (0, "budget is 0; expected at least 1 token"),
        ("-3", "budget is -3; expected at least 1"),
        ("0MB", "budget is 0MB; expected at least 1"),
        ("-1GB", "budget is -1GB"),
        ("0.4B", "budget is 0.4B"),
    ],
)
def test_parse_refuses(text, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_budget(text)


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 200_000), st.none() | st.integers(0, 40))
def test_the_largest_budget_that_fits(shape, size, buffer):
    def cost(budget):
        return shape.nbytes(budget, max(1, budget // 8) if buffer is None else buffer)

    if cost(1) > size:
        with pytest.raises(ConfigError, match=f"{cost(1):,} bytes for one token"):
            tokens_within(size, shape, buffer)
        return
    budget = 1
    while cost(budget + 1) <= size:
        budget += 1
    assert tokens_within(size, shape, buffer) == budget


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 400), st.integers(0, 60))
def test_bytes_are_those_of_the_arrays(shape, budget, buffer):
    def arrays(tokens, *widths):
        return tokens * shape.heads * sum(widths)

    kv = (shape.key_dim + shape.value_dim) * shape.itemsize
    g = shape.deferred(budget, buffer)
    log_beta, position, owner, table = (np.dtype(t).itemsize for t in ("f4", "i4", "i4", "i4"))
    # and a slot for what is not kept, and where each head's list begins, and the last one ends
    pool = arrays(budget, kv, log_beta, position, owner, table) + kv + 12 + 4 * (shape.heads + 1)
    recent = arrays(buffer, kv, log_beta)
    assert (
        shape.nbytes(budget, buffer) == pool + recent + g * shape.hidden_size * shape.layers * shape.itemsize
    )
    assert shape.full_nbytes(budget) == arrays(budget, kv)


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 4000), st.integers(0, 500))
def test_waiting_gate_inputs_stay_small(shape, budget, buffer):
    g = shape.deferred(budget, buffer)
    assert 1 <= g <= max(1, min(32, buffer))
    waiting = g * shape.hidden_size * shape.itemsize
    assert g == 1 or waiting <= 0.04 * (budget + buffer) * shape.kv_heads * shape.entry_bytes


@pytest.mark.parametrize("budget", [512, 1024, 8192])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("buffer", [0, 8, 128])
def test_overhead_at_half_precision(budget, heads, buffer):
    shape = CacheShape(36, heads, 128, 128, 2, 2560)
    floor = (budget + buffer) * shape.heads * shape.entry_bytes
    assert floor < shape.nbytes(budget, buffer) <= 1.15 * floor


def test_a_known_model():
    # 151 MB for K and V of 1024 tokens in 36 layers of 8 heads; 4.8 GB for a full cache of 32k
    assert QWEN3_4B.full_nbytes(1024) == 150_994_944
    assert QWEN3_4B.full_nbytes(32768) == 4_831_838_208
    # 216 MB for the entries, 27 for the buffer, 13 for bookkeeping and what waits for the gates
    assert tokens_within(256 * 10**6, QWEN3_4B, None) == 1465
