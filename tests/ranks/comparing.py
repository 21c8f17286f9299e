"""What several processes made, against what one made."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret.core.snapshot import read_snapshot


def same_cache(path: Path, other: Path) -> None:
    """Two files hold the same entries, of values that differ by rounding."""
    ours, theirs = read_snapshot(path), read_snapshot(other)
    assert (ours.packed is None) == (theirs.packed is None)
    assert (ours.counts == theirs.counts).all()
    assert (ours.position == theirs.position).all()
    assert (ours.seen, ours.model, ours.gates, ours.eviction) == (
        theirs.seen, theirs.model, theirs.gates, theirs.eviction,
    )  # fmt: skip
    for name in ("keys", "values"):
        a, b = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_allclose(a.float32(), b.float32(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.retention, theirs.retention, rtol=1e-4, atol=1e-5)


def same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name, expected in alone.items():
        if name not in found:
            continue
        if isinstance(expected, dict):
            assert found[name]["kept"] == expected["kept"], name
            assert found[name]["figures"] == expected["figures"], name
            np.testing.assert_allclose(found[name]["logits"], expected["logits"], atol=1e-5, err_msg=name)
        elif "drawn" not in name:
            assert found[name] == expected, name


def check(alone: dict[str, Any], apart: Path, together: Path, size: int) -> dict[str, Any]:
    """Every rank in ``together`` found what one process did in ``apart``; returns the first one's."""
    found = [pickle.loads((together / f"{rank}.pickle").read_bytes()) for rank in range(size)]
    for one in found:
        same(one, alone)
        # what is drawn without a seed is the same on all ranks
        for name in one:
            if "drawn" in name:
                assert one[name] == found[0][name]
    for path in together.glob("made*.kv"):
        same_cache(path, apart / path.name)
    return found[0]


def hand_over(made: Path, given: Path) -> None:
    """What was saved in one folder is there to be opened in another."""
    for path in made.glob("made*.kv"):
        (given / path.name.replace("made", "given")).write_bytes(path.read_bytes())


def same_after(again: dict[str, Any], found: dict[str, Any]) -> None:
    """What one process opened and what several did holds the same and goes on alike."""
    opened = [name for name in again if name.startswith(("went on", "reopened"))]
    assert opened
    for name in opened:
        assert again[name] == found[name], name
