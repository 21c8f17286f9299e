"""Attention kernels against plain MLX in float32, in all passes of the harness."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal_host import assert_close, check

from mlx_kvret.mlx_backend.attention import attend_reference
from mlx_kvret.mlx_backend.kernels import HEAD_SIZES, TYPES
from mlx_kvret.mlx_backend.kernels.attention import attend
from mlx_kvret.mlx_backend.kernels.prefill_attention import LARGEST, by_head, prefill_attention, tiled
from mlx_kvret.mlx_backend.view import LayerView

from .cases import as_floats, batch_with, uniform, view_with

TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
RAGGED = [21, 0, 1, 6]
HARMLESS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def exact(queries, view, scale, causal=True, sinks=None):
    """The twin, with all arithmetic in float32, rounded once."""
    windows = (a.astype(mx.float32) for a in view.pair)
    bias = view.bias
    wide = LayerView(as_floats(view.pool), view.layer, *windows, view.slabs, view.lengths, bias)
    return attend_reference(queries.astype(mx.float32), wide, scale, causal, sinks).astype(queries.dtype)


def compare(queries, view, *options, kernel=attend, passes=("asan", "tsan", "run")):
    scale = queries.shape[-1] ** -0.5
    check(
        lambda: kernel(queries, view, scale, *options),
        lambda: exact(queries, view, scale, *options),
        TOLERANCE[queries.dtype],
        passes,
    )


def queries_for(view, group, tokens, dtype=mx.float32):
    return uniform(len(view.slabs), view.kv_heads * group, tokens, view.keys.shape[-1], dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 11], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_every_size_and_type(size, dtype, tokens):
    if tokens > 1 and size > LARGEST:
        pytest.skip("MLX's own attention takes these, in several launches")
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


@pytest.mark.parametrize("bits", [8, "k8v4", 4])
@pytest.mark.parametrize("size", [size for size in HEAD_SIZES if size % 32 == 0])
def test_packed_entries(size, bits):
    index = HEAD_SIZES.index(size) + (8, "k8v4", 4).index(bits)
    dtype = TYPES[index % len(TYPES)]
    for tokens, kernel in ((1, attend), (11, tiled)):
        if kernel is attend or size <= LARGEST:
            view = view_with(RAGGED, tokens + 2, size, size, dtype, bits=bits)
            passes = ("asan", "tsan", "run") if size == 32 or (size, bits) == (96, "k8v4") else ("run",)
            queries = queries_for(view, 2, tokens, dtype)
            compare(queries, view, True, None, kernel=kernel, passes=passes)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_packed_values_of_another_size(dtype):
    view = view_with([40, 0, 7, 90], 3, 192, 128, dtype, bits="k8v4")
    compare(queries_for(view, 4, 1, dtype), view, True, uniform(16, dtype=dtype), passes=("run",))


def test_packed_entries_by_mlx_s_own_attention():
    view = view_with(RAGGED, 14, 512, 512, bits=8)
    queries, options = queries_for(view, 2, 12), (512**-0.5, True, None)
    assert_close(prefill_attention(queries, view, *options), exact(queries, view, *options), 1e-5)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize(
    ("lengths", "recent"),
    [
        ([[21, 0], [0, 0], [1, 300]], [3, 1, 9]),
        ([[300, 3], [3, 3]], [1, 1]),
        ([[5, 9]], [4]),
        ([[0, 0]] * 4, [2, 1, 3, 1]),
        ([[7, 1]] * 16, list(range(1, 17))),
    ],
    ids=["ragged", "100:1", "one", "nothing kept", "16 rows"],
)
def test_rows_of_a_batch(lengths, recent, placed, bits):
    view = batch_with(lengths, recent, 32, bits=bits, placed=placed)
    thorough = len(lengths) == 3 and placed
    passes = ("asan", "tsan", "run") if thorough else ("run",)
    compare(queries_for(view, 2, 1), view, True, None, passes=passes)
    if not placed:
        compare(queries_for(view, 2, 1), view, True, uniform(4), passes=("run",))


@pytest.mark.parametrize(("size", "group"), [(64, 20), (128, 1), (128, 3), (128, 8), (128, 20)])
def test_query_rows_are_shared_out(group, size):
    view = view_with([40, 0, 70], 3, size, size, mx.float16)
    passes = ("tsan", "run") if group == 8 else ("run",)
    compare(queries_for(view, group, 1, mx.float16), view, True, None, passes=passes)
    view = batch_with([[20, 3], [0, 50]], [2, 5], size, mx.float16, bits=8)
    compare(queries_for(view, group, 1, mx.float16), view, True, None, passes=("run",))


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
    bits=st.sampled_from([None, 8, "k8v4", 4]),
    seed=st.integers(0, 99),
)
def test_any_lengths_in_any_pieces(monkeypatch, lengths, recent, piece, bits, seed):
    monkeypatch.setattr("mlx_kvret.mlx_backend.kernels.decode_attention.PIECE_BYTES", piece * 256)
    mx.random.seed(seed)
    view = view_with(lengths, recent, 32, 32, bits=bits)
    compare(queries_for(view, 2, 1), view, passes=("run",))
