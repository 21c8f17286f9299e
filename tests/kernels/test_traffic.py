"""Bytes moved, counted: the promises of the kernels' design, whatever the imbalance."""

import mlx.core as mx
import pytest
from metal_host import EMULATED

from mlx_kvret.mlx_backend.kernels import decode_attention

from .traffic import chunks, compaction, decode, launches, prefill, rows

PIECE_BYTES = decode_attention.PIECE_BYTES
pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulator counts; here the kernels run")
MOST_MEMORY = 32 * 1024


@pytest.fixture(autouse=True)
def _real_pieces(monkeypatch):
    """In place of the small ones of other tests; still small for 4 heads."""
    monkeypatch.setattr("mlx_kvret.mlx_backend.kernels.decode_attention.PIECE_BYTES", 25_600)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("lengths", [[300] * 4, [1200, 12, 12, 12], [0, 0, 0, 1000]])
def test_decoding_reads_each_entry_once(lengths, group, tokens):
    seen = decode(lengths, recent=13, group=group, size=64, tokens=tokens)
    assert seen.threadgroups > 8
    assert seen.entries == 1.0
    assert seen.spread < 0.1
    assert seen.memory <= MOST_MEMORY


@pytest.mark.parametrize("bits", [8, "k8v4", 4])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_packed_entries_are_read_once_as_they_are_stored(size, bits):
    seen = decode([900, 9, 0, 50], recent=5, group=8, size=size, bits=bits)
    assert seen.threadgroups > 3
    assert seen.entries == 1.0


@pytest.mark.parametrize("bits", [None, 8, "k8v4", 4])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_rows_of_a_batch_are_read_once_in_one_launch(count, bits):
    lengths = [[300, 3] if row % 2 else [3, 3] for row in range(count)]
    seen = rows(lengths, [1 + row % 5 for row in range(count)], group=4, size=64, bits=bits)
    assert seen.threadgroups % count == 0
    assert seen.entries == 1.0


def test_prefill_reads_packed_entries_as_they_are_stored():
    seen, blocks = prefill([200, 9], 8, 4, 64, bits="k8v4")
    assert blocks == 1 and 1.0 <= seen.entries <= 1.05


def test_threadgroups_of_a_launch(monkeypatch):
    """Qwen3-4B: 8 KV heads of 128 in 16 bits, whose entries take 512 bytes."""
    monkeypatch.setattr("mlx_kvret.mlx_backend.kernels.decode_attention.PIECE_BYTES", PIECE_BYTES)
    found = [decode_attention.pieces(budget * 9 // 8 * 8 * 512) for budget in (128, 256, 512, 1024, 4096)]
    assert found == [32, 32, 36, 72, 128]
    assert [decode_attention.pieces(10**7, rows) * rows for rows in (1, 2, 8, 16)] == [128] * 4
    assert decode_attention.pieces(100) == decode_attention.pieces(10**9, 200) == 1


def test_all_that_decoding_moves_is_little_more_than_the_entries(monkeypatch):
    monkeypatch.setattr("mlx_kvret.mlx_backend.kernels.decode_attention.PIECE_BYTES", PIECE_BYTES)
    seen = decode([1000] * 4, recent=13, group=4, size=128)
    assert 1.0 < seen.loaded + seen.stored <= 1.1


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("group", [2, 16])
def test_the_largest_heads_fit_into_threadgroup_memory(group, dtype):
    assert decode([30] * 2, recent=13, group=group, size=256, tokens=2, dtype=dtype).memory <= MOST_MEMORY
    if group == 2:
        seen, _ = prefill([10, 3], 33, group, 256, dtype)
        assert seen.memory <= MOST_MEMORY


def test_prefill_reads_entries_once_for_each_block_of_rows():
    seen, blocks = prefill([60, 9, 0, 100], 96, 2, 96)
    # later tokens of the chunk are not read for blocks of earlier ones
    assert blocks == 3 and 0.7 * blocks < seen.entries < blocks


@pytest.mark.parametrize("bits", [None, 8, "k8v4", 4])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_chunks_of_rows_are_read_once_for_each_block_of_query_rows(rows, bits):
    lengths = [[300, 3] if row % 2 else [3, 3] for row in range(rows)]
    seen, blocks = chunks(lengths, [1 + row % 9 for row in range(rows)], 4, 64, bits=bits)
    assert set(blocks) == {1} and 1.0 <= seen.entries <= 1.05
    assert seen.memory <= MOST_MEMORY


@pytest.mark.parametrize(("rows", "ties"), [(1, False), (1, True), (3, False)])
def test_a_compaction_reads_the_scores_four_times_and_moves_no_more_than_it_evicts(rows, ties):
    seen = compaction(
        kept=16_000 // rows // 16 * 16, new=4_000 // rows // 16 * 16, heads=16, ties=ties, rows=rows
    )
    assert seen.score_reads == 4.0 and seen.launches == 11
    assert 0.5 < seen.moves <= 1.0
    assert seen.memory <= MOST_MEMORY


def test_a_compaction_of_many_rows_costs_little_more_launches_than_one():
    ours, one = launches(1, layers=3, kv_heads=2)
    for count in (2, 16):
        several, every = launches(count, layers=3, kv_heads=2)
        assert several == ours == 12
        # a few more: tokens of many windows are gathered, and log β of a chunk stand in an array for each row
        assert every <= one + 2 * 3 + count + 8
    apart, most = launches(16, layers=3, kv_heads=2, together=False)
    assert apart == 16 * ours and most >= 15 * one
