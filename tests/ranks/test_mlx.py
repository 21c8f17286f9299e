"""A model held by several processes on MLX keeps and says what one process does."""

from __future__ import annotations

from pathlib import Path

from . import mlx_worker
from .comparing import check, hand_over, same_after
from .processes import HERE, ring, run


def test_two_processes_as_one(tmp_path: Path) -> None:
    """Heads, layers or copies of latents; what one saves the others open, and the other way round."""
    size, splits, alone = 2, ["heads", "layers", "copies"], {}
    for split in splits:
        apart, together = tmp_path / "alone" / split, tmp_path / "together" / split
        apart.mkdir(parents=True)
        together.mkdir(parents=True)
        alone[split] = mlx_worker.work(split, apart)
        hand_over(apart, together)
    done = run([str(HERE / "mlx_worker.py"), str(tmp_path / "together"), *splits], ring(size, tmp_path))
    assert [one.returncode for one in done] == [0] * size, done[0].stderr + done[-1].stderr
    for split in splits:
        apart, together = tmp_path / "alone" / split, tmp_path / "together" / split
        found = check(alone[split], apart, together, size)
        hand_over(together, apart)
        again = mlx_worker.work(split, apart, names=[])
        same_after(again, found)
