"""What gates retain: soft cache size by layer and head, and what is left of each position at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.types import Floats, Ints

BINS = 128


def profile(log_beta: Floats, size: Floats, position: Ints, layers: int) -> dict[str, Any]:
    """Measured on packed documents, in plain lists.

    Args:
        log_beta: (B, L·H, T). ``size`` the soft size (B, L·H, T).
        position: (B, T) the place within the document, -1 in padding.
        layers: L.

    Returns:
        ``soft_size`` [L][H]: mean soft size after each token, in tokens. ``retained``: mean over heads and
        documents of β_i^(n - 1 - i) at the end of an n-token document, by ``position`` i, in bins.
    """
    real, place = position >= 0, np.arange(position.shape[1])
    sizes = (size * real[:, None]).sum((0, 2)) / real.sum()
    # a document ends where the next token begins another, or padding
    last = np.pad(position[:, 1:] <= 0, ((0, 0), (0, 1)), constant_values=True)
    end = np.minimum.accumulate(np.where(last, place, len(place))[:, ::-1], 1)[:, ::-1]
    retained = np.exp(log_beta * (end - place)[:, None]).mean(1)[real]
    position_of = position[real]
    edges = np.unique(np.linspace(0, position_of.max() + 1, BINS + 1).astype(int))
    which = np.digitize(position_of, edges) - 1
    count = np.bincount(which, minlength=len(edges) - 1)
    mean = np.bincount(which, retained, len(edges) - 1) / np.maximum(count, 1)
    return {
        "soft_size": sizes.reshape(layers, -1).tolist(),
        "position": edges[:-1].tolist(),
        "retained": mean.tolist(),
    }
