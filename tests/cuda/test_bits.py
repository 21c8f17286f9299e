"""Kept entries in few bits: core's own bytes, read as what they stand for, in every way a cache is used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_kvret
from mlx_kvret.core.bits import Packing
from mlx_kvret.core.snapshot import read_snapshot, write_snapshot
from mlx_kvret.cuda_backend import hooks, pool, snapshots
from mlx_kvret.cuda_backend.batch import BatchGenerator
from mlx_kvret.cuda_backend.packing import pack, unpack
from mlx_kvret.cuda_backend.recording import Called
from mlx_kvret.cuda_backend.snapshots import stored
from mlx_kvret.cuda_backend.step import FixedStep
from mlx_kvret.errors import ConfigError, ModelMismatchError, UnsupportedFeatureError

from .tiny import FAMILIES, attached, new_cache, run

BITS: list[Any] = [8, "k8v4", 4]
IDS = torch.randint(1, 96, (2, 70), generator=torch.Generator().manual_seed(4))
SMALL = {"budget": 10, "buffer": 4}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Heads of 32, the smallest that divide into groups."""
    monkeypatch.setitem(FAMILIES["qwen3"], "head_dim", 32)
    found, made = attached("qwen3")
    made.owner["gates"] = "random"
    return found


def read(model: Any, cache: Any, ids: torch.Tensor, *ends: int) -> list[torch.Tensor]:
    """Logits after chunks up to each of the ``ends``."""
    starts = (0, *ends[:-1])
    return [run(model, ids[:, a:b], cache)[:, -1] for a, b in zip(starts, ends, strict=True)]


def kept(cache: Any) -> str:
    return str([cache.kept_positions(row) for row in range(cache.rows)])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bytes_and_floats_are_those_of_core(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([32, 64]))
    form = Packing(group * data.draw(st.integers(1, 3)), data.draw(st.sampled_from([8, 4])), group)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows = rng.normal(size=(6, form.width)) * 10.0 ** rng.integers(-6, 3, (6, 1))
    rows[0], rows[1], rows[2] = 0.3, 0, np.round(rows[2])
    rows[3] += 1000 * np.abs(rows[3]).max()
    vectors = torch.from_numpy(rows.astype(np.float32)).clamp(-6e4, 6e4).to(dtype)
    packed = pack(vectors, form)
    expected = form.pack(stored(vectors))
    assert np.array_equal(packed.numpy().view(np.uint32), expected)
    floats = form.unpack(expected, stored(vectors).dtype).float32()
    assert np.array_equal(unpack(packed, form, dtype).float().numpy(), floats)


@pytest.mark.parametrize("kv_bits", BITS)
@pytest.mark.parametrize("policy", ["learned", "keydiff", "knorm"])
def test_entries_are_what_floats_of_the_same_values_would_be(
    model: Any, monkeypatch: pytest.MonkeyPatch, kv_bits: Any, policy: str
) -> None:
    options = SMALL | {"policy": policy, "scope": "layer"}
    cache = new_cache(model, **options, kv_bits=kv_bits)
    logits, ends = [], (9, 33, 50, *range(51, 62))
    logits = read(model, cache, IDS, *ends)
    # the same in a pool of floats, which are rounded on their way
    (key_form, value_form), seen = cache.shared.arena.pool.forms, []

    def rounded(self: Any, which: int, vectors: torch.Tensor) -> torch.Tensor:
        seen.append(which)
        form = (key_form, value_form)[which]
        return unpack(pack(vectors, form), form, vectors.dtype)

    monkeypatch.setattr(pool.Pool, "stored", rounded)
    monkeypatch.setattr(pool.Pool, "as_kept", lambda self, keys: rounded(self, 0, keys))
    twin = new_cache(model, **options)
    assert twin.shared.arena.pool.forms == (None, None)
    for ours, theirs in zip(logits, read(model, twin, IDS, *ends), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert seen and kept(cache) == kept(twin)
    # and not what they were before they were rounded
    monkeypatch.undo()
    monkeypatch.setitem(FAMILIES["qwen3"], "head_dim", 32)
    other = new_cache(model, **options)
    assert not torch.allclose(logits[-1], read(model, other, IDS, *ends)[-1], rtol=1e-5, atol=1e-5)


def test_scores_of_keys_are_of_what_is_stored(model: Any) -> None:
    cache = new_cache(model, **SMALL, policy="knorm", kv_bits=4)
    read(model, cache, IDS[:1], 30, 31, 50)
    slab = cache.shared.rows[0].slab
    used = slab.owner < slab.heads
    norms = slab.pool.read(0, slab.keys[used]).norm(dim=-1)
    torch.testing.assert_close(slab.retention[used], -norms, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_bits", BITS)
def test_bytes_are_counted(model: Any, kv_bits: Any) -> None:
    caches = [new_cache(model, budget=64, buffer=4, kv_bits=bits) for bits in (None, kv_bits)]
    for cache in caches:
        read(model, cache, IDS[:1], 66, *range(67, 71))
        cache.settle()
    wide, packed = (cache.shared.arena.pool for cache in caches)
    assert packed.nbytes < wide.nbytes
    (key, value), slots = packed.forms, packed.slots
    assert packed.keys.nbytes + packed.values.nbytes == slots * 4 * (key.words(4) + value.words(4))
    # what core plans with, but for a spill slot and the table's end
    shape, limit = caches[1].shared.shape, caches[1].shared.arena.limit
    planned = shape.nbytes(64, limit, kv_bits)
    assert caches[1].nbytes <= planned + 4 * (key.words(4) + value.words(4)) + 4 * (shape.heads + 8)
    assert caches[1].nbytes > 0.9 * planned


def test_rows_are_what_they_are_alone(model: Any) -> None:
    prompts = [ids[:n].tolist() for ids, n in zip(IDS[[0, 1, 0]], (30, 9, 51), strict=True)]
    bits = {"budget": 12, "buffer": 4, "kv_bits": "k8v4"}
    generator = BatchGenerator(model, max_tokens=12, prefill_step_size=13)
    uids = generator.insert(prompts, caches=[new_cache(model, **bits) for _ in prompts])
    found: dict[int, list[Any]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response)
    for uid, ids in zip(uids, prompts, strict=True):
        cache = new_cache(model, **bits)
        stream = mlx_kvret.stream_generate(model, None, ids, cache=cache, max_tokens=12, prefill_step_size=13)
        assert [response.token for response in found[uid]] == [response.token for response in stream]
        assert kept(found[uid][-1].prompt_cache) == kept(cache)
    refused = new_cache(model, budget=12, buffer=4)
    with pytest.raises(UnsupportedFeatureError, match="kv_bits"):
        generator.insert([prompts[0]] * 2, caches=[refused, new_cache(model, **bits)])


def test_recorded_steps_and_copies(model: Any) -> None:
    caches = [new_cache(model, **SMALL, kv_bits=8) for _ in range(2)]
    for cache in caches:
        read(model, cache, IDS, 3)
    step = FixedStep(model, caches[0], Called)
    for at in range(3, 40):
        token = IDS[:, at : at + 1]
        ours, theirs = step(token, torch.clone), run(model, token, caches[1])[:, -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert step.captures == 1 and not step.failed and kept(caches[0]) == kept(caches[1])
    before, shared, apart = kept(caches[1]), caches[1].copy(), copy.deepcopy(caches[1])
    assert shared.nbytes == caches[1].nbytes
    read(model, caches[1], IDS, 20)
    assert kept(shared) == kept(apart) == before != kept(caches[1])
    for one, other in zip(read(model, shared, IDS, 9, 20), read(model, apart, IDS, 9, 20), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 3, 14, 45])
@pytest.mark.parametrize("kv_bits", BITS)
def test_saved_words_are_the_pool_s_own(model: Any, kv_bits: Any, tokens: int, tmp_path: Path) -> None:
    cache = new_cache(model, **SMALL, kv_bits=kv_bits)
    if tokens:
        read(model, cache, IDS[:1], tokens)
    write_snapshot(tmp_path / "kv", snapshots.take(cache, {}))
    saved = read_snapshot(tmp_path / "kv")
    twin = hooks.reopened_cache(model, saved)
    assert kept(twin) == kept(cache) and twin.shared.config == cache.shared.config
    again = snapshots.take(twin, {})
    assert saved.packed is not None and again.packed is not None
    for name in ("keys", "values"):
        ours, theirs = getattr(saved.packed, name).bits, getattr(again.packed, name).bits
        assert np.array_equal(ours, theirs) and ours.dtype == np.uint32
    assert len(saved.packed.keys.bits) == (0 if tokens < 4 else sum(map(len, _pooled(cache))))
    for one, other in zip(*(read(model, c, IDS[:1], 5, 30, 31) for c in (cache, twin)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert kept(twin) == kept(cache)


def _pooled(cache: Any) -> list[Any]:
    (row,) = cache.shared.rows
    slab = row.slab
    return [slab.owner[slab.owner < slab.heads]]


def test_what_cannot_be_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="expected 8"):
        mlx_kvret.make_cache(model, budget=8, kv_bits=3)
    with pytest.raises(ConfigError, match="policy 'full'"):
        mlx_kvret.make_cache(model, budget=8, kv_bits=8, policy="full")
    narrow, _ = attached("llama")
    with pytest.raises(UnsupportedFeatureError, match="heads of 8 elements"):
        mlx_kvret.make_cache(narrow, budget=8, kv_bits=8)
    cache = mlx_kvret.make_cache(model, budget=8, kv_bits="8")
    with pytest.raises((ConfigError, ModelMismatchError), match="kv_bits"):
        mlx_kvret.generate(model, None, [1, 2], cache=cache, kv_bits=4)


def test_a_budget_in_bytes_holds_more_in_fewer_bits(model: Any) -> None:
    held = [
        mlx_kvret.make_cache(model, budget="100KB", kv_bits=bits).shared.config.budget for bits in (16, 8, 4)
    ]
    assert held[0] * 2 < held[1] and held[1] * 1.3 < held[2]
    text = mlx_kvret.generate(model, None, IDS[0].tolist(), budget=10, kv_bits="k8v4", max_tokens=5)
    assert len(text.split()) == 5
