"""A model held by several processes on torch keeps and says what one process does."""

from __future__ import annotations

from pathlib import Path

from . import torch_worker
from .comparing import check, hand_over, same_after
from .processes import HERE, gloo, run


def test_three_processes_as_one(tmp_path: Path) -> None:
    """All there is; what three save one opens, and the other way round."""
    source, apart, together = (tmp_path / name for name in ("model", "alone", "together"))
    for folder in (apart, together):
        folder.mkdir()
    torch_worker.save(source)
    size = 3
    alone = torch_worker.work(apart, source)
    hand_over(apart, together)
    command = [str(HERE / "torch_worker.py"), str(together), str(source)]
    done = run(command, gloo(size, tmp_path))
    assert [one.returncode for one in done] == [0] * size, done[0].stderr + done[-1].stderr
    found = check(alone, apart, together, size)
    hand_over(together, apart)
    again = torch_worker.work(apart, source, [])
    same_after(again, found)
