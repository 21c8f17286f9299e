"""One step of training: the gradient of a whole batch, in micro-batches and over processes."""

from __future__ import annotations

import numpy as np
import torch

from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.packing import Batch
from mlx_kvret.training.report import Losses

from ..gates import RetentionGates
from ..kernels.soft_size import soft_size
from .loss import active, capacity, distillation
from .processes import Processes, rounds
from .student import Student


def gradient(
    student: Student,
    gates: RetentionGates,
    batch: Batch,
    config: TrainConfig,
    processes: Processes,
    micro_batch: int,
    slack: float = 0.0,
) -> Losses:
    """Leave the batch's gradient in the gates, the same in every process; returns the mean losses.

    ``slack`` as in :func:`.loss.capacity`.
    """
    gates.zero_grad()
    learnt = max(int(batch.learn.sum()), 1)
    over = max(int(active(torch.from_numpy(batch.position), config.budget).sum()), 1)
    sums = torch.zeros(4, device=processes.device)
    for part, rows in rounds(batch, processes, micro_batch, bool(student.shards)):
        with student.shards.whole():
            kl, ce, hinge, size, none = _forward(student, gates, part, rows, config, processes.device, slack)
            loss = (kl + ce) / (2 * learnt) + config.capacity_weight * hinge / over
            (loss + none).backward()
        sums += torch.stack([kl, ce, hinge, size]).detach()
    sums = _reduce(gates, sums, processes)
    entries = student.layers * student.kv_heads
    return Losses.of(sums.tolist(), batch, over, entries, config.capacity_weight)


def _forward(
    student: Student,
    gates: RetentionGates,
    batch: Batch,
    rows: list[int],
    config: TrainConfig,
    device: torch.device,
    slack: float,
) -> tuple[torch.Tensor, ...]:
    """Sums over some rows: KL, cross-entropy, hinge of the capacity, soft size over heads and tokens.

    And 0, whose gradient of 0 goes through every layer, so that all are gathered even if nothing is learnt.
    """
    ids, starts, position, learn = (
        torch.from_numpy(np.ascontiguousarray(array[rows])).to(device)
        for array in (batch.ids, batch.starts, batch.position, batch.learn)
    )
    seen = student.see(ids, starts, batch, rows)
    teacher = student.teach(ids, starts, seen).hidden
    trace = student.learn(ids, starts, gates, config.sinks, seen)
    assert trace.log_beta is not None
    target = ids.roll(-1, 1)[learn]
    vocabulary = student.model.config.get_text_config().vocab_size
    kl, ce = distillation(student.logits, trace.hidden[learn], teacher[learn], target, vocabulary)
    size = soft_size(trace.log_beta, starts)
    hinge = capacity(size, position, config.budget, config.scope, slack)
    total = (size.detach() * (position >= 0)[:, None]).sum()
    return kl, ce, hinge, total, 0 * trace.hidden[:, -1].sum()


def _reduce(gates: RetentionGates, sums: torch.Tensor, processes: Processes) -> torch.Tensor:
    """Add up gradients and sums of all processes in one message."""
    weights = list(gates.parameters())
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    if processes.count > 1:
        flat = processes.sum(torch.cat([*(gradient.flatten() for gradient in gradients), sums]))
        *parts, sums = flat.split([*(weight.numel() for weight in weights), len(sums)])
        gradients = [part.view_as(weight) for weight, part in zip(weights, parts, strict=True)]
    for weight, own in zip(weights, gradients, strict=True):
        weight.grad = own
    return sums
