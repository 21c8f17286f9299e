"""How likely a text's tokens are, given logits that come chunk by chunk.

``logits`` are those after each token of a chunk, ``last`` those before its first one, None at the start of a
text, whose first token is then left out. They are too many to be moved, so each backend sums where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.types import Floats


def log_likelihoods(last: Floats | None, logits: Floats, ids: Sequence[int]) -> Floats:
    """Log-likelihood of each of ``ids`` given what came before.

    ``logits`` (n, words) are those after each of the n ids; ``last`` (1, words) those before the first, None
    at the start of a text, whose first token is then left out.
    """
    before = logits[:-1] if last is None else np.concatenate([last, logits[:-1]])
    wanted = np.asarray(ids[len(ids) - len(before) :])
    top = before.max(-1, keepdims=True)
    norm = top[:, 0] + np.log(np.exp(before - top).sum(-1))
    return np.asarray(before[np.arange(len(before)), wanted] - norm)


def on_torch(last: Any, logits: Any, texts: Sequence[Sequence[int]]) -> Floats:
    """Negative log-likelihoods (texts, tokens); ``last`` (texts, 1, words), ``logits`` (texts, n, words)."""
    import torch
    from torch.nn import functional as F

    ids = torch.tensor([list(own) for own in texts], device=logits.device)
    pairs = [] if last is None else [(last, ids[:, :1])]
    pairs.append((logits[:, :-1], ids[:, 1:]))
    parts = []
    for found, wanted in pairs:
        # row by row: in float32 the logits of a chunk are large
        rows = zip(found, wanted, strict=True)
        parts.append(torch.stack([F.cross_entropy(a.float(), b, reduction="none") for a, b in rows]))
    nats: Floats = torch.cat(parts, 1).cpu().numpy()
    return nats


def on_mlx(last: Any, logits: Any, texts: Sequence[Sequence[int]]) -> Floats:
    """As :func:`on_torch`."""
    import mlx.core as mx
    import mlx.nn as nn

    wanted = mx.array([list(ids) for ids in texts])
    pairs = [] if last is None else [(last, wanted[:, :1])]
    pairs += [(logits[:, :-1], wanted[:, 1:])] if wanted.shape[1] > 1 else []
    parts = [nn.losses.cross_entropy(own.astype(mx.float32), ids) for own, ids in pairs]
    return np.array(mx.concatenate(parts, 1)) if parts else np.zeros((len(texts), 0), np.float32)
