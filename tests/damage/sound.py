"""What all forms of files share: what one is, what reading gives, and the content written into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.tensors import Tensor

CHAT = [
    {"role": "user", "content": "remember Ada red recall Ada"},
    {"role": "assistant", "content": "red"},
]
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]


class TheirRefusal(Exception):
    """A loader of another library refused a file before any of our code saw it."""


@dataclass
class Content:
    """What was read: bytes of tensors by name, all of them finite, and the rest as text."""

    tensors: dict[str, bytes] = field(default_factory=dict)
    rest: str = ""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], rest: Any = None) -> Content:
        for name, tensor in tensors.items():
            if not tensor.finite:
                raise AssertionError(f"{name} was read with NaN or infinity in it")
        return cls({name: t.dtype.encode() + t.bits.tobytes() for name, t in tensors.items()}, repr(rest))


@dataclass(frozen=True)
class Form:
    """``make`` writes sound files into a folder, ``load`` reads the folder; ``damaged`` names may be changed.

    ``sealed``: a checksum stands over tensors and texts. ``slow``: a whole model is built.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], Content]
    damaged: tuple[str, ...]
    sealed: bool = False
    slow: bool = False


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def gates() -> GateCheckpoint:
    model = json.loads((demo.MODEL / "config.json").read_text())
    config = GateConfig("rg10", 3, 2, 64, 32, training_budget=16, base_fingerprint=fingerprint(model))
    made = rng()
    return GateCheckpoint(
        config, {n: Tensor.of(made.normal(size=s)) for n, s in config.tensor_shapes().items()}, {"from": "x"}
    )
