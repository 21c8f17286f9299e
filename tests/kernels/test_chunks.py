"""Chunks of several rows: their tokens stand together and ask in one launch; padding is never looked at."""

import math

import mlx.core as mx
import numpy as np
import pytest
from metal_host import check

from mlx_kvret.mlx_backend.attention import attend_rows
from mlx_kvret.mlx_backend.kernels import TYPES, prefill_attention
from mlx_kvret.mlx_backend.kernels.launch import rows as host_rows
from mlx_kvret.mlx_backend.kernels.prefill_attention import chunk_rows, tiled_rows
from mlx_kvret.mlx_backend.view import Chunk, ChunkView

from .cases import pool_with, uniform
from .test_attention import TOLERANCE, exact


def chunks_with(lengths, ends, tokens, key_dim=32, value_dim=32, dtype=mx.float32, bits=None):
    """Rows of ``lengths`` (R, H) kept entries and ``ends`` (R,) newest tokens, of which ``tokens`` (R,) ask.

    They stand on slabs in another order, and there is a query row between each two of them that does not ask.
    """
    rows, heads = len(lengths), len(lengths[0])
    slabs = [[3] * 2 * heads for _ in range(rows + 1)]
    taken = list(reversed(range(1, rows + 1)))
    for slab, kept in zip(taken, lengths, strict=True):
        slabs[slab][heads:] = kept
    pool = pool_with(slabs, key_dim, value_dim, dtype, bits=bits)
    begins = np.cumsum([0, *ends]).tolist()
    keys, values = (uniform(1, heads, begins[-1], width, dtype=dtype) for width in (key_dim, value_dim))
    told = zip(taken, begins, ends, tokens, strict=False)
    own = tuple(Chunk(1 + 2 * row, *numbers) for row, numbers in enumerate(told))
    return ChunkView(pool, 1, keys, values, own)


def queries_for(chunks, group, dtype=mx.float32):
    """What is padding is NaN."""
    heads, width = chunks.keys.shape[1], chunks.keys.shape[3]
    most = max(row.tokens for row in chunks.rows)
    made = np.full((2 * len(chunks.rows) + 1, heads * group, most, width), math.nan, np.float32)
    for row in chunks.rows:
        made[row.index, :, : row.tokens] = np.array(uniform(heads * group, row.tokens, width)) * 3
    return mx.array(made).astype(dtype)


def one_by_one(queries, chunks, scale, causal, sinks):
    """The twin: row by row, in float32; zeros for padding."""
    out = np.zeros((*queries.shape[:3], chunks.values.shape[3]), np.float32)
    for row in chunks.rows:
        own = queries[row.index : row.index + 1, :, : row.tokens]
        found = exact(own, chunks.view(row), scale, causal, sinks)
        out[row.index, :, : row.tokens] = np.array(found[0].astype(mx.float32))
    return mx.array(out).astype(queries.dtype)


def compare(chunks, group, causal=True, sinks=None, dtype=mx.float32, passes=("run",)):
    queries = queries_for(chunks, group, dtype)
    given = queries, chunks, queries.shape[3] ** -0.5, causal, sinks
    check(lambda: tiled_rows(*given), lambda: one_by_one(*given), TOLERANCE[dtype], passes)


RAGGED = [[21, 0], [0, 0], [1, 40], [9, 9]], [13, 9, 30, 12], [11, 9, 1, 4]


@pytest.mark.parametrize("bits", [None, 8, "k8v4", 4])
def test_rows_of_a_chunk(bits):
    chunks = chunks_with(*RAGGED, bits=bits)
    compare(chunks, 2, sinks=uniform(4), passes=("asan", "tsan", "run") if bits == "k8v4" else ("run",))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_types(dtype):
    compare(chunks_with(*RAGGED, dtype=dtype), 4, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_any_number_of_rows(rows):
    chance = np.random.default_rng(rows)
    lengths = chance.integers(0, 12, (rows, 2)).tolist()
    tokens = chance.integers(1, 20, rows)
    ends = tokens + chance.integers(0, 9, rows)
    compare(chunks_with(lengths, ends.tolist(), tokens.tolist()), 3, causal=rows != 5)


def test_a_row_of_a_hundred_times_another_s():
    # several blocks of query rows of the first row, one token of the second
    compare(chunks_with([[2, 0], [300, 3]], [100, 1], [100, 1], key_dim=64, value_dim=32), 2)


def test_rows_without_padding():
    chunks = chunks_with([[5, 2]] * 2, [9, 9], [9, 9])
    whole = ChunkView(*(getattr(chunks, n) for n in ("pool", "layer", "keys", "values")), tuple(
        Chunk(at, row.slab, row.begin, row.end, row.tokens) for at, row in enumerate(chunks.rows)
    ))  # fmt: skip
    compare(whole, 2)


def test_nothing_kept_yet():
    chunks = chunks_with([[0, 0]] * 2, [9, 4], [9, 4])
    empty = chunks.pool.__class__(1, 4, 3)
    compare(ChunkView(empty, 1, chunks.keys, chunks.values, chunks.rows), 2)


def test_where_rows_stand_is_told_once_for_all_layers(monkeypatch):
    told = []
    monkeypatch.setattr(
        prefill_attention, "host_rows", lambda rows: told.append(len(rows)) or host_rows(rows)
    )
    prefill_attention._told.cache_clear()
    # both layers' heads have entries
    chunks = chunks_with([[3, 2], [4, 1]], [5, 2], [5, 2])
    for layer in (0, 1):
        compare(ChunkView(chunks.pool, layer, chunks.keys, chunks.values, chunks.rows), 2)
    assert told == [2]


@pytest.mark.parametrize("rows", [2, 16])
def test_chunks_stand_behind_windows(rows):
    heads, room, most = 2, 6, 9
    windows = uniform(rows + 1, heads, room, 32), uniform(rows + 1, heads, room, 40)
    chance = np.random.default_rng(rows)
    held, counts = chance.integers(0, room + 1, rows), chance.integers(0, most + 1, rows)
    # as a model hands them over, not contiguous; what is padding is NaN
    new = [uniform(rows, most, heads, width) for width in (32, 40)]
    for array in new:
        for row, n in enumerate(counts):
            array[row, int(n) :] = math.nan
    new = [array.transpose(0, 2, 1, 3) for array in new]
    where, expected = [], ([], [])
    for row, (old, n) in enumerate(zip(held.tolist(), counts.tolist(), strict=True)):
        where += [(-1 - (rows - row), place) for place in range(old)] + [(row, place) for place in range(n)]
        for side in (0, 1):
            expected[side].append(windows[side][rows - row, :, :old])
            expected[side].append(new[side][row, :, :n])
    index = host_rows(np.array(where, np.int32))
    check(
        lambda: list(chunk_rows(*new, windows, index, len(where))),
        lambda: [mx.concatenate(side, axis=1)[None] for side in expected],
        passes=("asan", "tsan", "run"),
    )


def test_without_kernels_rows_attend_one_after_another():
    chunks = chunks_with(*RAGGED)
    queries = queries_for(chunks, 2)
    given = queries, chunks, 0.2, True, None
    found, expected = attend_rows(*given), one_by_one(*given)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)
