"""Whether several processes were started to hold a model together, and which of them this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """Rank ``rank`` of the processes that ``launcher`` started for a backend, ``"mlx"`` or ``"torch"``."""

    launcher: str
    backend: str
    rank: int


def launched() -> Launched | None:
    """What ``mlx.launch`` or ``torchrun`` says in the environment; None of a process on its own."""
    environment = os.environ
    if (rank := environment.get("MLX_RANK", "")).isdecimal():
        several = any(environment.get(name) for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"))
        if several or environment.get("MLX_WORLD_SIZE", "1") != "1":
            return Launched("mlx.launch", "mlx", int(rank))
    size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    if size.isdecimal() and int(size) > 1 and rank.isdecimal():
        return Launched("torchrun", "torch", int(rank))
    return None
