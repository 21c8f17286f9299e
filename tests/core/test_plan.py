"""What fits into a memory: against counting up, and the shares that are kept of a text's parts."""

import numpy as np
import pytest

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.parts import kept_by_part
from mlx_kvret.core.plan import parse_memory, parse_tokens, plan, size
from mlx_kvret.errors import ConfigError

QWEN3_4B = CacheShape(36, 8, 128, 128, 2, 2560)
GB = 10**9


def needed(shape, budget, conversations, weights, chunk):
    """Bytes, added up."""
    return weights + shape.full_nbytes(chunk) + conversations * shape.nbytes(budget, max(1, budget // 8))


@pytest.mark.parametrize("memory", [12 * GB, 16 * GB, 24 * GB])
@pytest.mark.parametrize("conversations", [1, 4, 7])
def test_the_largest_budget_fits_and_one_more_does_not(memory, conversations):
    found = plan(QWEN3_4B, memory, 8 * GB, 2**20, conversations)
    most = found.largest.budget
    assert needed(QWEN3_4B, most, conversations, 8 * GB, 2048) <= memory
    assert needed(QWEN3_4B, most + 1, conversations, 8 * GB, 2048) > memory
    assert found.largest.conversations == conversations


def test_as_many_conversations_fit_as_are_said():
    found = plan(QWEN3_4B, 16 * GB, 8 * GB, 131072, smallest=1000)
    assert [row.budget for row in found.bounded] == [256, 512, 1000, *(2**n for n in range(10, 17))]
    for row in found.bounded:
        assert needed(QWEN3_4B, row.budget, row.conversations, 8 * GB, 2048) <= 16 * GB
        assert needed(QWEN3_4B, row.budget, row.conversations + 1, 8 * GB, 2048) > 16 * GB
        assert row.sound == (row.budget >= 1000)
    assert found.full.nbytes == 131072 * 36 * 8 * 256 * 2 and found.full.conversations == 0


def test_where_the_full_cache_fits_no_budget_is_needed():
    found = plan(QWEN3_4B, 16 * GB, 8 * GB, 4096, 4)
    assert found.full.conversations >= 4 and found.largest is None
    # nor is one that would never evict
    assert all(row.budget * 9 // 8 <= 4096 for row in found.bounded)
    assert plan(QWEN3_4B, 16 * GB, 8 * GB, 4096, 10**6).largest is None


def test_weights_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"weights take 8.00 GB.*of 8.00 GB of memory"):
        plan(QWEN3_4B, 8 * GB, 8 * GB, 4096)


def test_sizes_and_lengths():
    assert [parse_tokens(text) for text in ("4096", "128k", "1M", " 2 K ")] == [4096, 131072, 2**20, 2048]
    assert parse_memory("16GB") == 16 * GB and parse_memory("1.5GiB") == 3 * 2**29
    for text in ("", "many", "128kb", "1.5k", "0", "-1", "9" * 12):
        with pytest.raises(ConfigError, match="context"):
            parse_tokens(text)
    for text in ("", "16", "lots", "0GB", "-1GB", "1TB"):
        with pytest.raises(ConfigError, match="the memory is"):
            parse_memory(text)
    assert [size(n) for n in (0, 61_400_000, 550e6, 1.2345e9, 123e9)] == [
        "0.00 MB", "61.4 MB", "550 MB", "1.23 GB", "123 GB",
    ]  # fmt: skip


@pytest.mark.parametrize("seen, parts", [(1, 1), (5, 5), (16, 16), (100, 16), (4097, 16)])
def test_shares_by_part_are_counted(seen, parts):
    heads = 3
    rng = np.random.default_rng(seen)
    kept = rng.random((heads, seen)) < np.linspace(0, 1, seen)
    found = kept_by_part(np.nonzero(kept)[1], heads, seen)
    assert len(found) == parts and found[0].start == 0 and found[-1].end == seen
    for part, after in zip(found, [*found[1:], None], strict=True):
        assert part.share == kept[:, part.start : part.end].mean()
        assert after is None or (part.end == after.start and abs(part.end - part.start - seen / parts) < 1)


def test_a_cache_that_has_read_nothing_has_no_parts():
    assert kept_by_part(np.zeros(0, np.int32), 3, 0) == []
