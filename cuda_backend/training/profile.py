"""What gates retain: soft cache size by layer and head, and what is left of each position at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mlx_kvret.training.packing import Batch

from ..gates import RetentionGates
from ..kernels.soft_size import soft_size
from .student import Student

BINS = 128


def profile(
    student: Student, gates: RetentionGates, batch: Batch, rows: list[int], device: torch.device
) -> dict[str, Any]:
    """Measured on some rows of a batch, in plain lists.

    Returns:
        ``soft_size`` [L][H]: mean soft size after each token, in tokens. ``retained``: mean over heads and
        documents of β_i^(n - 1 - i) at the end of an n-token document, by ``position`` i, in bins.
    """
    ids, starts, position = (
        torch.from_numpy(np.ascontiguousarray(array[rows])).to(device)
        for array in (batch.ids, batch.starts, batch.position)
    )
    with torch.no_grad():
        log_beta = student.learn(ids, starts, gates).log_beta
        assert log_beta is not None
        real = position >= 0
        sizes = (soft_size(log_beta, starts) * real[:, None]).sum((0, 2)) / real.sum()
    # a document ends where the next token begins another, or padding
    place = torch.arange(ids.shape[1], device=device).expand_as(ids)
    last = torch.nn.functional.pad(position[:, 1:] <= 0, (0, 1), value=True)
    end = torch.where(last, place, ids.shape[1]).flip(1).cummin(1).values.flip(1)
    retained = (log_beta * (end - place)[:, None]).exp().mean(1)[real].cpu().numpy()
    position_of = position[real].cpu().numpy()
    edges = np.unique(np.linspace(0, position_of.max() + 1, BINS + 1).astype(int))
    which = np.digitize(position_of, edges) - 1
    count = np.bincount(which, minlength=len(edges) - 1)
    mean = np.bincount(which, retained, len(edges) - 1) / np.maximum(count, 1)
    return {
        "soft_size": sizes.view(student.layers, student.kv_heads).tolist(),
        "position": edges[:-1].tolist(),
        "retained": mean.tolist(),
    }
