"""Attention kernels against plain MLX in float32, in all passes of the harness."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal_host import assert_close, check

from mlx_kvret.mlx_backend.attention import attend_reference
from mlx_kvret.mlx_backend.kernels import HEAD_SIZES, TYPES
from mlx_kvret.mlx_backend.kernels.attention import attend
from mlx_kvret.mlx_backend.kernels.prefill_attention import by_head, tiled
from mlx_kvret.mlx_backend.view import LayerView

from .cases import uniform, view_with

TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
RAGGED = [21, 0, 1, 6]
HARMLESS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def exact(queries, view, scale, causal=True, sinks=None):
    """The twin, with all arithmetic in float32, rounded once."""
    pool, names = view.pool, ("keys", "values")
    held = [getattr(pool, name) for name in names]
    for name in names:
        setattr(pool, name, getattr(pool, name).astype(mx.float32))
    wide = LayerView(pool, view.layer, view.keys.astype(mx.float32), view.values.astype(mx.float32))
    out = attend_reference(queries.astype(mx.float32), wide, scale, causal, sinks)
    for name, array in zip(names, held, strict=True):
        setattr(pool, name, array)
    return out.astype(queries.dtype)


def compare(queries, view, *options, kernel=attend, passes=("asan", "tsan", "run")):
    scale = queries.shape[-1] ** -0.5
    check(
        lambda: kernel(queries, view, scale, *options),
        lambda: exact(queries, view, scale, *options),
        TOLERANCE[queries.dtype],
        passes,
    )


def queries_for(view, group, tokens, dtype=mx.float32):
    return uniform(1, view.kv_heads * group, tokens, view.keys.shape[-1], dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 11], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_every_size_and_type(size, dtype, tokens):
    view = view_with(RAGGED, tokens + 2, size, size, dtype)
    options = (True, None)
    kernel = attend if tokens == 1 else tiled
    # each size in one type goes through the sanitizers; they see nothing of a type but its width
    thorough = TYPES[HEAD_SIZES.index(size) % len(TYPES)] == dtype
    passes = ("asan", "tsan", "run") if thorough else ("run",)
    compare(queries_for(view, 2, tokens, dtype), view, *options, kernel=kernel, passes=passes)


@pytest.mark.parametrize(
    "lengths",
    [[0, 0, 0, 0], [1, 0, 0, 0], [300, 3, 3, 3], [3, 3, 3, 300], [0, 0, 40, 0]],
    ids=["nothing kept", "one entry", "100:1", "1:100", "one head"],
)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_ragged_heads(lengths, tokens):
    view = view_with(lengths, tokens, 32, 32)
    compare(queries_for(view, 2, tokens), view, True, None, kernel=attend if tokens < 9 else tiled)


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_full_pool(tokens):
    view = view_with([9, 0, 0, 11], tokens + 20, 32, 32, layer=2, free=0)
    assert view.pool.lookup.offsets[-1].item() == view.pool.lookup.table.size
    compare(queries_for(view, 2, tokens), view, True, None, kernel=attend if tokens < 9 else tiled)


@pytest.mark.parametrize("tokens", [3, 9])
def test_tokens_that_cannot_be_seen_yet_do_not_count_however_large(tokens):
    view = view_with(RAGGED, tokens, 32, 32)
    view.keys[:, :, -1] *= 1e5
    compare(queries_for(view, 2, tokens), view, True, None, kernel=attend if tokens < 9 else tiled)


@pytest.mark.parametrize("tokens", [2, 8])
def test_a_few_tokens_of_many_query_heads_share_one_read(tokens):
    view = view_with(RAGGED, tokens + 1, 64, 64, mx.float16)
    compare(queries_for(view, 8, tokens, mx.float16), view)


@pytest.mark.parametrize("tokens", [1, 12])
def test_keys_and_values_of_different_sizes(tokens):
    view = view_with(RAGGED, tokens, 192, 128)
    compare(queries_for(view, 3, tokens), view)


@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_sinks_and_no_causality(tokens):
    view = view_with(RAGGED, tokens + 4, 32, 64)
    queries, sinks = queries_for(view, 2, tokens), uniform(8) * 3
    compare(queries * 20, view, True, sinks)
    compare(queries, view, False, sinks, passes=("run",))


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_inputs_that_are_not_contiguous(tokens):
    view = view_with([5, 9], tokens + 3, 32, 32)

    def turned(array):  # the same numbers, columns first
        return mx.contiguous(array.swapaxes(2, 3)).swapaxes(2, 3)

    view = LayerView(view.pool, view.layer, turned(view.keys), turned(view.values))
    queries = mx.contiguous(queries_for(view, 2, tokens).transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    compare(queries, view, True, None, kernel=attend if tokens < 9 else tiled)


@pytest.mark.parametrize("sinks", [False, True])
def test_prefill_by_mlx_s_own_attention(sinks):
    view = view_with(RAGGED, 14, 64, 64)
    queries, options = queries_for(view, 2, 12), (64**-0.5, True, uniform(8) if sinks else None)
    assert_close(by_head(queries, view, *options), exact(queries, view, *options), 1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=HARMLESS)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=3, max_size=3),
    recent=st.integers(1, 9),
    piece=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_any_lengths_in_any_pieces(monkeypatch, lengths, recent, piece, seed):
    monkeypatch.setattr("mlx_kvret.mlx_backend.kernels.decode_attention.PIECE_BYTES", piece * 256)
    mx.random.seed(seed)
    view = view_with(lengths, recent, 32, 32)
    compare(queries_for(view, 2, 1), view, passes=("run",))
