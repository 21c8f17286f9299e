"""Every Triton kernel, interpreted without a GPU, against its naive twin on memory poisoned with NaN."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is for Linux only; CI installs it")

import mlx_kvret
from mlx_kvret.core.bits import packings
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend.attention import attend, naive_attend
from mlx_kvret.cuda_backend.kernels import decode_attention as decode
from mlx_kvret.cuda_backend.kernels import dispatch, moving
from mlx_kvret.cuda_backend.kernels.decode_attention import decode_attention
from mlx_kvret.cuda_backend.kernels.prefill_attention import prefill_attention
from mlx_kvret.cuda_backend.kernels.select import select_triton
from mlx_kvret.cuda_backend.pool import Pool
from mlx_kvret.cuda_backend.selection import select

from .views import DEVICE, HALF, INTERPRETED, random_chunks, random_view

# kernels round weights to half precision too, by 2**-11 of float16; outputs' neighbours are 2**-10 apart
HALVES = {"rtol": 2e-3, "atol": 2e-3}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="test_triton.py runs these in a process of their own"
)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


CASES = [
    # rows, KV heads, query heads per KV head, query tokens, places in the window, key and value dim
    (1, 1, 1, 1, 1, 16, 16),
    (1, 2, 4, 1, 70, 32, 32),
    (1, 3, 2, 5, 67, 24, 40),
    (3, 2, 1, 1, 8, 17, 16),
    (4, 3, 2, 1, 67, 24, 40),
    (1, 2, 5, 3, 130, 64, 64),
]


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
        torch.testing.assert_close(attend(queries, sound, 0.2), expected, **HALVES)
        for kernel in (partial(decode_attention, pieces=5), *prefill):
            torch.testing.assert_close(kernel(queries, view, 0.2), expected, **HALVES)


@pytest.mark.parametrize("kv_bits", [8, "k8v4", 4])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 3), (3, 1)])
def test_attention_over_packed_entries_equals_its_twin(kv_bits: Any, rows: int, tokens: int) -> None:
    view = random_view(rows, 2, 20, 64, 96, torch.float32, 20, kv_bits)
    queries = torch.randn(rows, 4, tokens, 64)
    sound = replace(view, keys=view.keys.nan_to_num(), values=view.values.nan_to_num())
    expected = naive_attend(queries, sound, 0.3)
    assert expected.isfinite().all()
    out = decode_attention(queries, view, 0.3, pieces=3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(queries, sound, 0.3), expected, rtol=1e-5, atol=1e-5)
    if rows == 1:
        out = prefill_attention(queries, view, 0.3)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_head_of_a_hundred_times_its_neighbours_entries(kv_bits: Any) -> None:
    view = random_view(2, 3, 10, 32, 32, torch.float32, 150, kv_bits, 100 / 102)
    queries = torch.randn(2, 3, 1, 32)
    lengths = view.lengths().reshape(2, 3)
    assert (lengths[:, 0] > 50 * lengths[:, 1:].mean(1)).all()
    sound = replace(view, keys=view.keys.nan_to_num(), values=view.values.nan_to_num())
    out = decode_attention(queries, view, 0.3, pieces=7)
    torch.testing.assert_close(out, naive_attend(queries, sound, 0.3), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("kv_bits", [None, 8, "k8v4", 4])
@pytest.mark.parametrize("special", ["plain", "sinks and softcap"])
def test_chunks_of_rows_equal_their_twins(kv_bits: Any, special: str) -> None:
    numbers = [(70, 66, 0), (3, 1, 4), (9, 9, 2), (40, 1, 0)]
    view, queries = random_chunks(numbers, *((16, 24) if kv_bits is None else (32, 64)), kv_bits)
    options = {} if special == "plain" else {"sinks": torch.randn(6), "softcap": 2.0}
    out = prefill_attention(queries, view, 0.3, **options)
    expected = torch.zeros_like(out)
    for at, part, own in view.views():
        expected[at, :, part] = naive_attend(queries[at, :, part], own, 0.3, **options)
    assert expected.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 16])
def test_any_number_of_rows_reads_chunks_at_once(rows: int) -> None:
    chance = np.random.default_rng(rows)
    tokens, held, first = (chance.integers(least, 9, rows) for least in (1, 0, 0))
    numbers = np.stack([tokens + held, tokens, first], 1).tolist()
    view, queries = random_chunks(numbers)
    out = prefill_attention(queries, view, 0.3)
    expected = torch.zeros_like(out)
    for at, part, own in view.views():
        expected[at, :, part] = naive_attend(queries[at, :, part], own, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what nobody touches takes no memory there")
def test_windows_of_more_elements_than_32_bits_count() -> None:
    heads, step, tokens = 3, 2**30 + 16, 2
    try:
        # 7 GB of addresses, of which a few pages are touched
        wide = torch.empty(heads * step, dtype=HALF)
    except RuntimeError:
        pytest.skip("the machine gives no program so many addresses")
    keys = wide.as_strided((1, heads, tokens, 16), (heads * step, step, 16, 1))
    keys.copy_(torch.randn(keys.shape))
    small = random_view(1, heads, tokens, 16, 16, HALF)
    view, near = (
        replace(small, keys=keys, values=keys),
        replace(small, keys=keys.clone(), values=keys.clone()),
    )
    queries = torch.randn(1, heads, tokens, 16).to(HALF)
    expected = naive_attend(queries, near, 0.3)
    for kernel in (prefill_attention, partial(decode_attention, pieces=2)):
        torch.testing.assert_close(kernel(queries, view, 0.3), expected, **HALVES)
    new = torch.randn(1, heads, 1, 16).to(HALF)
    moving.append(new, new, torch.tensor([0]), torch.tensor([1]), keys, keys)
    assert torch.equal(keys[:, :, 1:], new)


def test_a_long_chunk_sees_itself_causally() -> None:
    view = random_view(1, 2, 150, 16, 16, torch.float32)
    queries = torch.randn(1, 4, 141, 16)
    expected = naive_attend(queries, view, 0.3)
    torch.testing.assert_close(prefill_attention(queries, view, 0.3), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=6, deadline=None)
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
    # of sequences that select together, with budgets and clocks of their own
    rows = data.draw(st.integers(1, 2))
    own = torch.from_numpy(np.stack([rng.integers(3, 9, rows), rng.integers(60, 90, rows)])).to(DEVICE)
    budget, seen = (n.repeat_interleave(groups)[:, None] for n in own)
    # few different scores, so that ties decide; every (position, head) once, some slots free
    values = np.array([-np.inf, np.nan, -3.0, -1.5, -1e-6, -0.0, 0.0, 2.0], np.float32)
    score = values[rng.integers(0, len(values), (rows * groups, count))]
    cells = np.stack([rng.permutation(80 * size)[:count] for _ in range(rows * groups)])
    first = np.tile(np.arange(groups), rows)[:, None] * size
    head = np.where(rng.random(cells.shape) < 0.2, 6, cells % size + first)
    arrays = [torch.from_numpy(a).to(DEVICE) for a in (score, cells // size, head)]
    expected = select(*arrays, seen, config, size, 6, budget)
    assert torch.equal(select_triton(*arrays, seen, config, size, 6, budget), expected)
    for row in range(rows):
        part = slice(row * groups, (row + 1) * groups)
        alone = replace(config, budget=int(own[0, row]))
        kept = select(*(a[part] for a in arrays), int(own[1, row]), alone, size, 6)
        assert torch.equal(kept, expected[part])


def test_heads_of_other_sequences_are_others() -> None:
    rng = np.random.default_rng(0)
    score = torch.from_numpy(rng.normal(size=(2, 24)).astype(np.float32)).to(DEVICE)
    # what a head keeps in any case is far below the rest in one sequence, and far above in the other
    head = (torch.arange(24) % 3).expand(2, -1)
    score[0, head[0] == 1] -= 100
    score[1, head[1] == 1] += 100
    config = EvictionConfig(budget=3, buffer=1, min_per_head=2)
    arrays = score, (torch.arange(24) // 3).expand(2, -1), head
    expected = select(*arrays, 24, config, 3, 3)
    assert torch.equal(select_triton(*arrays, 24, config, 3, 3), expected)
    assert [(expected & (head == 1))[row].sum().item() for row in range(2)] == [2, 5]


def test_selection_of_many_candidates() -> None:
    count, heads = 5000, 8
    score = -torch.rand(1, count).exp().round(decimals=2)
    head = torch.arange(count)[None] % heads
    arrays = score, torch.arange(count)[None] // heads, head
    rest = 2**20, EvictionConfig(budget=100, buffer=1), heads, heads
    kept = select_triton(*arrays, *rest)
    assert kept.sum() == 800 and torch.equal(kept, select(*arrays, *rest))


BITS: list[Any] = [None, 8, "k8v4", 4]


@pytest.mark.parametrize("kv_bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_filling_holes_equals_its_twin(
    kv_bits: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # four entries at a time
    monkeypatch.setattr(moving, "TILE", 4 * 128)
    key_dim, value_dim = (24, 40) if kv_bits is None else (64, 96)
    keys, values = (
        torch.randn(2, 3, 9, key_dim)[:, :, :7].to(dtype),
        torch.randn(2, 3, 7, value_dim).to(dtype),
    )
    # a constant, zeros, a large element, numbers far from 0 and near each other, and steps that are ties
    keys[0, 0, :5] = torch.tensor([0.7, 0.0, -0.0, 1e4, 3e-9]).to(dtype)[:, None]
    keys[0, 1, 0, 5], keys[0, 1, 1] = 900.0, 1000 + torch.arange(key_dim) / 8
    # steps of 1 between whole numbers, so that halves tie
    keys[0, 1, 2] = (torch.arange(key_dim) / 2).clamp(max=14.5)
    keys[0, 1, 2, 1] = 15 if kv_bits == 4 else 255
    slots, keep = torch.randperm(43)[:42], torch.rand(42) < 0.6
    keep[:12] = True
    pools = []
    for _ in range(2):
        pool = Pool(2, 1, 1, DEVICE, packings(kv_bits, key_dim, value_dim))
        pool.grow(43, keys, values)
        for rows in (pool.keys, pool.values):
            rows.view(torch.uint8).fill_(255)
        pools.append(pool)
    # of both slabs
    slots = torch.where(slots % 2 == 0, slots, slots + pools[0].slots)
    moving.fill(pools[0], slots, keep, keys, values)
    pools[1].fill(slots[keep], keys.flatten(0, 2)[keep], values.flatten(0, 2)[keep])
    for name in ("keys", "values"):
        ours, expected = (getattr(pool, name).view(torch.uint8) for pool in pools)
        assert torch.equal(ours, expected)


def test_appending_equals_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "TILE", 4 * 64)
    rows, heads = 5, 3
    keys, values = torch.randn(rows, 1, heads, 24).transpose(1, 2), torch.randn(rows, heads, 1, 40)
    slabs, places = torch.randperm(8)[:rows], torch.arange(rows) * 2
    windows = [
        (torch.full((8, heads, 11, 24), torch.nan), torch.full((8, heads, 11, 40), torch.nan)) for _ in "ab"
    ]
    moving.append(keys, values, slabs, places, *windows[0])
    dispatch.append(keys, values, slabs, places, *windows[1])
    for ours, expected in zip(*windows, strict=True):
        assert ours.isfinite().any()
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kv_bits", [None, "k8v4"])
def test_a_model_on_kernels_says_what_it_says_without(kv_bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_kvret.cuda_backend import recording
    from mlx_kvret.cuda_backend.recording import Called

    from .tiny import FAMILIES, attached

    monkeypatch.setitem(FAMILIES, "qwen3", {"head_dim": 32, "num_hidden_layers": 2})
    model, _ = attached("qwen3")
    ids = torch.randint(1, 96, (2, 9), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    prompts = [ids[0].tolist(), ids[1, :5].tolist()]
    options = {"max_tokens": 3, "prefill_step_size": 8}
    ways = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "enabled", lambda _, on=kernels: on)
            if INTERPRETED:
                # a CPU cannot record; recorded steps are called again
                patch.setattr(recording, "recorder", lambda _, on=kernels: Called if on else None)
            cache = mlx_kvret.make_cache(model, budget=4, buffer=2, kv_bits=kv_bits)
            said = [
                one.token
                for one in mlx_kvret.stream_generate(model, None, prompts[0], cache=cache, **options)
            ]
            kept = [str(cache.kept_positions())]
            for one in mlx_kvret.stream_batch(
                model, None, prompts, budget=4, buffer=2, kv_bits=kv_bits, **options
            ):
                said.append((one.index, one.token))
                kept += [] if one.cache is None else [str(one.cache.kept_positions())]
            ways.append((said, kept))
    assert ways[0] == ways[1] and len(ways[0][1]) == 3


def test_rows_behind_padding_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from .tiny import FAMILIES, attached, new_cache, run

    monkeypatch.setitem(FAMILIES, "qwen3", {"head_dim": 8, "num_hidden_layers": 1})
    model, _ = attached("qwen3")
    ids = torch.randint(1, 96, (2, 13), generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(
        DEVICE
    )
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ways = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "enabled", lambda _, on=kernels: on)
            cache = new_cache(model, budget=6, buffer=2)
            steps = [(0, 7), (7, 11), (11, 12), (12, 13)]
            logits = [run(model, ids[:, a:b], cache, attention_mask=mask[:, :b])[:, -1] for a, b in steps]
            ways.append((torch.stack(logits), str([cache.kept_positions(row) for row in range(2)])))
    torch.testing.assert_close(ways[0][0], ways[1][0], rtol=0, atol=1e-5)
    assert ways[0][1] == ways[1][1]
