"""Kept entries in few bits: both backends store the same words, and one goes on with what the other saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from cuda.tiny import FAMILIES

import mlx_kvret.cuda_backend.snapshots as torch_snapshots
import mlx_kvret.mlx_backend.hooks as mlx_hooks
import mlx_kvret.mlx_backend.snapshots as mlx_snapshots
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.snapshot import Snapshot, read_snapshot, write_snapshot
from mlx_kvret.cuda_backend import hooks

from .test_backends import IDS, Backends, kept

BITS: list[Any] = [8, "k8v4", 4]
# of logits, where one code in thousands is another one because what it is made of was rounded differently
FLIPPED = 2e-4
OPTIONS: list[dict[str, Any]] = [{}, {"policy": "knorm"}, {"policy": "keydiff", "scope": "layer"}]


def shared_codes(one: Snapshot, other: Snapshot) -> float:
    """The share of the bytes of codes in which two snapshots agree."""
    assert one.packed is not None and other.packed is not None
    same = []
    for name, form in zip(("keys", "values"), one.packed.forms, strict=True):
        ours, theirs = (getattr(s.packed, name).bits[:, : form.codes] for s in (one, other))
        same.append((ours.copy().view(np.uint8) == theirs.copy().view(np.uint8)).ravel())
    return float(np.concatenate(same).mean())


@pytest.mark.parametrize("kv_bits", BITS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_backends_store_and_read_the_same(
    kv_bits: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no family that normalises its keys, whose norms would tie but for rounding
    monkeypatch.setitem(FAMILIES["llama"], "head_dim", 64)
    backends = Backends("llama", tmp_path)
    config = EvictionConfig.create(**{"budget": 16, "buffer": 5, "kv_bits": kv_bits} | options)
    caches: tuple[Any, Any] = backends.caches(config)
    for ours, theirs in backends.steps(caches, [40, 30, *[1] * 12]):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLIPPED)
        assert kept(caches[0]) == kept(caches[1])
    files = tmp_path / "torch.safetensors", tmp_path / "mlx.safetensors"
    write_snapshot(files[0], torch_snapshots.take(caches[0], {}))
    write_snapshot(files[1], mlx_snapshots.take(caches[1], {}))
    saved = [read_snapshot(file) for file in files]
    assert shared_codes(*saved) > 0.999
    # each goes on with the other's words
    swapped = (
        hooks.reopened_cache(backends.torch, saved[1]),
        mlx_hooks.reopened_cache(backends.mlx, saved[0]),
    )
    assert kept(swapped[0]) == kept(swapped[1]) == kept(caches[0])
    again = torch_snapshots.take(swapped[0], {}), mlx_snapshots.take(swapped[1], {})
    for ours, theirs in zip(again, saved[::-1], strict=True):
        assert ours.packed is not None and theirs.packed is not None
        assert np.array_equal(ours.packed.keys.bits, theirs.packed.keys.bits)
        assert np.array_equal(ours.packed.values.bits, theirs.packed.values.bits)
    for part in np.split(IDS[82:90], [3, 4, 5]):
        with torch.no_grad():
            ours = backends.torch(torch.from_numpy(part)[None], cache=swapped[0]).logits[0, -1].numpy()
        theirs = np.array(backends.mlx(mx.array(part)[None], cache=swapped[1])[0, -1])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLIPPED)
