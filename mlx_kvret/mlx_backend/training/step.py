"""One step of training: the gradient of a whole batch, in micro-batches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ...training.config import TrainConfig
from ...training.packing import Batch
from ...training.report import Losses
from ..gates import RetentionGates
from .attention import PackedMask
from .loss import capacity, distillation
from .soft_size import soft_size
from .student import Student


def gradient(
    student: Student,
    gates: RetentionGates,
    batch: Batch,
    config: TrainConfig,
    micro_batch: int,
    slack: float = 0.0,
) -> tuple[Losses, dict[str, Any]]:
    """The mean losses of a batch and their gradient, a tree like the gates' parameters.

    ``slack`` as in :func:`.loss.capacity`.
    """
    learnt = max(int(batch.learn.sum()), 1)
    over = int((batch.position >= config.budget).sum())
    sums, total = mx.zeros(4), tree_map(mx.zeros_like, gates.trainable_parameters())
    for first in range(0, len(batch.ids), micro_batch):
        rows = slice(first, first + micro_batch)
        if (batch.position[rows] < 0).all():
            continue
        part, found = _micro_batch(student, gates, batch, rows, config, learnt, over, slack)
        sums, total = sums + part, tree_map(mx.add, total, found)
        mx.eval(sums, total)
    entries = student.layers * student.kv_heads
    values: list[float] = sums.tolist()  # type: ignore[assignment]
    return Losses.of(values, batch, over, entries, config.capacity_weight), total


def _micro_batch(
    student: Student,
    gates: RetentionGates,
    batch: Batch,
    rows: slice,
    config: TrainConfig,
    learnt: int,
    over: int,
    slack: float,
) -> tuple[mx.array, dict[str, Any]]:
    """Sums over some rows (KL, cross-entropy, hinge of the capacity, soft size), and the gradient."""
    host, starts = batch.ids[rows], batch.starts[rows]
    which = range(len(batch.ids))[rows]
    ids, position = mx.array(host.astype(np.int32)), mx.array(batch.position[rows].astype(np.int32))
    places = np.flatnonzero(batch.learn[rows])
    chosen, target = mx.array(places), mx.array(np.roll(host, -1, 1).flatten()[places])
    seen = student.see(ids, starts, batch, which)
    teacher = student.teach(ids, starts, seen).hidden.flatten(0, 1)[chosen]
    # or it would wait, with all its layers, until the student's loss is computed
    mx.eval(teacher)

    def loss() -> tuple[mx.array, mx.array]:
        trace = student.learn(ids, starts, gates, config.sinks, seen)
        assert trace.log_beta is not None
        hidden = trace.hidden.flatten(0, 1)[chosen]
        kl, ce = distillation(student.logits, hidden, teacher, target, student.vocabulary)
        size = soft_size(trace.log_beta, PackedMask(starts))
        hinge = capacity(size, position, config.budget, config.scope, slack)
        value = (kl + ce) / (2 * learnt) + config.capacity_weight * hinge / max(over, 1)
        return value, mx.stack([kl, ce, hinge, (size * (position >= 0)[:, None]).sum()])

    (_, sums), found = nn.value_and_grad(gates, loss)()
    mx.eval(sums, found)
    return sums, found
