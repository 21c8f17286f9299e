"""Every Triton kernel, in the interpreter, against its naive twin on memory poisoned with NaN."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is for Linux only; CI installs it")

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend.attention import attend, naive_attend
from mlx_kvret.cuda_backend.kernels import decode_attention as decode
from mlx_kvret.cuda_backend.kernels.decode_attention import decode_attention
from mlx_kvret.cuda_backend.kernels.moving import fill, naive_fill
from mlx_kvret.cuda_backend.kernels.prefill_attention import prefill_attention
from mlx_kvret.cuda_backend.kernels.select import select_triton
from mlx_kvret.cuda_backend.pool import Pool, listing
from mlx_kvret.cuda_backend.selection import select
from mlx_kvret.cuda_backend.view import LayerView, Places

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_triton.py runs these in a process of their own"
)

CASES = [
    # rows, KV heads, query heads per KV head, query tokens, places in the window, key and value dim
    (1, 1, 1, 1, 1, 16, 16),
    (1, 2, 4, 1, 70, 32, 32),
    (1, 3, 2, 5, 67, 24, 40),
    (3, 2, 1, 1, 8, 17, 16),
    (4, 3, 2, 1, 67, 24, 40),
    (1, 2, 5, 3, 130, 64, 64),
]


def random_view(
    rows: int, heads: int, places: int, key_dim: int, value_dim: int, dtype: torch.dtype, capacity: int = 60
) -> LayerView:
    """Layer 1 of 3 with ragged heads, some of them empty; what must not be read is NaN.

    Rows stand in a pool with free slabs, in another order, and their windows have lengths of their own.
    """
    rng = np.random.default_rng(rows * 31 + heads)
    layers, slabs = 3, rows + 2
    size = layers * heads
    pool = Pool(slabs, 1, size, torch.device("cpu"))
    shape = (slabs, heads, places + 7)
    keys, values = (torch.randn(*shape, dim).to(dtype) for dim in (key_dim, value_dim))
    pool.grow(capacity, keys, values)
    share = rng.dirichlet([0.3] * size, slabs) * 0.8
    # the layer's second head is empty
    share[:, heads + 1 : heads + 2] = 0
    for index, own in enumerate(share):
        slab = pool.slab(index)
        local = rng.choice(size + 1, len(slab.owner) - 1, p=[*own, 1 - own.sum()])
        slab.owner[:-1] = torch.from_numpy(local)
        table, offsets = listing(slab.owner, size, len(slab.table))
        slab.take({"table": table, "offsets": offsets})
    used = (pool.owner < size)[..., None]
    pool.keys = torch.where(used, torch.randn(*used.shape[:2], key_dim).to(dtype), torch.nan)
    pool.values = torch.where(used, torch.randn(*used.shape[:2], value_dim).to(dtype), torch.nan)
    if rows == 1:
        return LayerView(pool, 1, 1, keys[1:2, :, :places], values[1:2, :, :places])
    which, lengths = rng.permutation(slabs)[:rows], rng.integers(0, places, rows)
    for slab, length in enumerate(np.full(slabs, -1)):
        if slab in which:
            length = lengths[list(which).index(slab)]
        keys[slab, :, length + 1 :], values[slab, :, length + 1 :] = torch.nan, torch.nan
    numbers = torch.from_numpy(np.stack([which, lengths, lengths + 1, lengths, lengths + 99]))
    return LayerView(pool, 0, 1, keys, values, Places(pool, numbers, torch.device("cpu")))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("special", ["plain", "sinks", "softcap"])
def test_attention_equals_its_twin(case: tuple[int, ...], special: str) -> None:
    rows, heads, group, tokens, places, key_dim, value_dim = case
    view = random_view(rows, heads, places, key_dim, value_dim, torch.float32)
    queries = torch.randn(rows, heads * group, tokens, key_dim)
    options = {
        "sinks": torch.randn(heads * group) if special == "sinks" else None,
        "softcap": 2.0 if special == "softcap" else None,
    }
    sound = replace(view, keys=view.keys.nan_to_num(), values=view.values.nan_to_num())
    expected = naive_attend(queries, sound, 0.3, **options)
    assert expected.isfinite().all()
    for pieces in (1, 5) if special == "plain" else (5,):
        out = decode_attention(queries, view, 0.3, **options, pieces=pieces)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if rows == 1:
        out = prefill_attention(queries, view, 0.3, **options)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(queries, sound, 0.3, **options), expected, rtol=1e-5, atol=1e-5)


def test_attention_in_half_precision() -> None:
    # Triton's interpreter has no bfloat16 arithmetic
    for rows, tokens in ((1, 2), (2, 1)):
        view = random_view(rows, 2, 50, 32, 32, torch.float16)
        queries = torch.randn(rows, 6, tokens, 32).half()
        sound = replace(view, keys=view.keys.nan_to_num(), values=view.values.nan_to_num())
        expected = naive_attend(queries, sound, 0.2)
        prefill = [prefill_attention] if rows == 1 else []
        torch.testing.assert_close(attend(queries, sound, 0.2), expected, rtol=2e-3, atol=2e-3)
        for kernel in (partial(decode_attention, pieces=5), *prefill):
            torch.testing.assert_close(kernel(queries, view, 0.2), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_many_parts_are_merged(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PIECE_ENTRIES", 16)
    # two parts at a time
    monkeypatch.setattr(decode, "MERGED", 2 * 16 * 16)
    view = random_view(rows, 1, 40 if rows > 1 else 75, 16, 16, torch.float32)
    queries = torch.randn(rows, 2, 1, 16)
    sound = replace(view, keys=view.keys.nan_to_num(), values=view.values.nan_to_num())
    out = decode_attention(queries, view, 0.3, pieces=6)
    torch.testing.assert_close(out, naive_attend(queries, sound, 0.3), rtol=1e-5, atol=1e-5)


def test_a_long_chunk_sees_itself_causally() -> None:
    view = random_view(1, 2, 150, 16, 16, torch.float32)
    queries = torch.randn(1, 4, 141, 16)
    expected = naive_attend(queries, view, 0.3)
    torch.testing.assert_close(prefill_attention(queries, view, 0.3), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_selection_equals_its_twin(data: st.DataObject) -> None:
    scope = data.draw(st.sampled_from(["global", "layer", "head"]))
    size = {"global": 6, "layer": 2, "head": 1}[scope]
    groups, count = 6 // size, data.draw(st.integers(1, 70))
    options: dict[str, Any] = data.draw(
        st.sampled_from(
            [{}, {"min_per_head": 2}, {"sinks": 1, "window": 2}, {"threshold": 0.4, "min_per_head": 1}]
        )
    )
    config = EvictionConfig(budget=data.draw(st.integers(3, 9)), buffer=1, scope=scope, **options)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    # few different scores, so that ties decide; every (position, head) once, some slots free
    values = np.array([-np.inf, np.nan, -3.0, -1.5, -1e-6, -0.0, 0.0, 2.0], np.float32)
    score = values[rng.integers(0, len(values), (groups, count))]
    cells = np.stack([rng.permutation(80 * size)[:count] for _ in range(groups)])
    head = np.where(rng.random((groups, count)) < 0.2, 6, cells % size + np.arange(groups)[:, None] * size)
    arrays = torch.from_numpy(score), torch.from_numpy(cells // size), torch.from_numpy(head)
    rest = torch.full((groups, 1), 80), config, size, 6
    assert torch.equal(select_triton(*arrays, *rest), select(*arrays, *rest))


def test_selection_of_many_candidates() -> None:
    count, heads = 5000, 8
    score = -torch.rand(1, count).exp().round(decimals=2)
    head = torch.arange(count)[None] % heads
    arrays = score, torch.arange(count)[None] // heads, head
    rest = 2**20, EvictionConfig(budget=100, buffer=1), heads, heads
    kept = select_triton(*arrays, *rest)
    assert kept.sum() == 800 and torch.equal(kept, select(*arrays, *rest))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_filling_holes_equals_its_twin(share: float) -> None:
    keys, values = torch.randn(2, 3, 9, 24)[:, :, :7], torch.randn(2, 3, 7, 40).half()
    keep = torch.rand(42) < share
    slots = torch.randperm(60)[:42]
    pools = [(torch.full((60, 24), torch.nan), torch.full((60, 40), torch.nan).half()) for _ in range(2)]
    fill(keys, values, slots, keep, *pools[0])
    naive_fill(keys, values, slots, keep, *pools[1])
    for ours, expected in zip(*pools, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_a_model_on_kernels_equals_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_kvret.cuda_backend.kernels import dispatch

    from .tiny import attached, new_cache, run

    model, _ = attached("qwen3")
    ids = torch.randint(1, 96, (2, 18), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ways = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "enabled", lambda _, on=kernels: on)
            cache = new_cache(model, budget=6, buffer=2)
            steps = [(0, 9), (9, 14), *((i, i + 1) for i in range(14, 18))]
            logits = [run(model, ids[:, a:b], cache, attention_mask=mask[:, :b])[:, -1] for a, b in steps]
            ways.append((torch.stack(logits), str([cache.kept_positions(row) for row in range(2)])))
    torch.testing.assert_close(ways[0][0], ways[1][0], rtol=0, atol=1e-5)
    assert ways[0][1] == ways[1][1]
