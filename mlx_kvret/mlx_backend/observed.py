"""What the gates are shown: attention inputs of one forward pass, and later their log β.

Gates are deferred: inputs wait until some tokens have come, then one call of all layers' gates serves them
all, of all rows, so that a decoded token does not pay for reading the gates' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.state import State
from ..core.types import Ints

# of whose tokens, from which to which: where the log β of a row's newest tokens are found
Piece = tuple["Observed", int, int]
Gates = Callable[[Sequence[Sequence[mx.array]]], mx.array]


class Observed:
    """N tokens of one pass, row by row; ``tokens`` of them belong to the longest row.

    ``inputs`` are those of each layer (N, hidden), until ``log_beta`` (L, H, K) has them from ``first`` on.
    """

    def __init__(self, layers: int, tokens: int, count: int) -> None:
        self.tokens, self.count = tokens, count
        self.inputs: list[mx.array | None] = [None] * layers
        self.scores: list[mx.array | None] = [None] * layers
        self.log_beta: mx.array | None = None
        self.first = 0

    def whole(self) -> dict[str, Any]:
        """What becomes of it when each layer's gate was asked as soon as it was shown its inputs."""
        if any(score is None for score in self.scores):
            return {}
        return {"log_beta": mx.stack(self.scores), "scores": []}  # type: ignore[arg-type]

    def part(self, start: int, end: int) -> int:
        """Bytes of what is held for some of its tokens."""
        if self.log_beta is not None:
            return self.log_beta.nbytes // self.log_beta.shape[2] * (end - start)
        return sum(array.nbytes for array in self.arrays()) * (end - start) // self.count

    def arrays(self) -> list[mx.array]:
        held = [a for a in (*self.inputs, *self.scores) if a is not None]
        return held if self.log_beta is None else [*held, self.log_beta]


def scored(waiting: Sequence[Observed], gates: Gates) -> State:
    """All that wait, scored: one call of all layers' gates."""
    inputs = [[one.inputs[layer] for one in waiting] for layer in range(len(waiting[0].inputs))]
    log_beta = gates(inputs).swapaxes(1, 2)  # type: ignore[arg-type]
    ends = np.cumsum([one.count for one in waiting]).tolist()
    return State(
        (one, {"log_beta": log_beta, "first": end - one.count, "inputs": []})
        for one, end in zip(waiting, ends, strict=True)
    )


def known(log_beta: mx.array) -> list[Piece]:
    """The pieces of tokens whose log β (L, H, tokens) are known."""
    layers, _, tokens = log_beta.shape
    made = Observed(layers, tokens, tokens)
    made.log_beta, made.inputs, made.scores = log_beta, [], []
    return [(made, 0, tokens)]


def log_beta_of(pieces: Sequence[Piece]) -> mx.array:
    """log β (L, H, tokens) of pieces that have been scored."""
    found, (columns,) = log_beta_in([pieces])
    first = int(columns[0])
    if (columns == np.arange(first, first + len(columns))).all():
        return found[:, :, first : first + len(columns)]
    return found[:, :, mx.array(columns.astype(np.int32))]


def log_beta_in(rows: Sequence[Sequence[Piece]]) -> tuple[mx.array, list[Ints]]:
    """log β (L, H, K) of the pieces of several rows, which have been scored, and each row's columns."""
    begin: dict[int, int] = {}
    arrays: list[mx.array] = []
    found: list[Ints] = []
    for pieces in rows:
        columns = []
        for one, start, end in pieces:
            assert one.log_beta is not None
            if id(one.log_beta) not in begin:
                begin[id(one.log_beta)] = sum(array.shape[2] for array in arrays)
                arrays.append(one.log_beta)
            first = begin[id(one.log_beta)] + one.first
            columns.append(np.arange(first + start, first + end))
        found.append(np.concatenate(columns))
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=2), found


def shortened(pieces: Sequence[Piece], oldest: int = 0, newest: int = 0) -> list[Piece]:
    """Pieces without some of the oldest and some of the newest tokens."""
    left = list(pieces)
    while oldest:
        one, start, end = left.pop(0)
        drop = min(oldest, end - start)
        oldest -= drop
        if start + drop < end:
            left.insert(0, (one, start + drop, end))
    while newest:
        one, start, end = left.pop()
        drop = min(newest, end - start)
        newest -= drop
        if start + drop < end:
            left.append((one, start, end - drop))
    return left
