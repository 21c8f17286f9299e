"""Geometric retention: an entry's future use from log β and age (arXiv 2512.03324, 2605.09649).

Everything is float32 and in log space: log β of a good token is about -1e-6, β itself would round to 1.
"""

from __future__ import annotations

import numpy as np

from .types import Floats, Ints


def log_sigmoid(logit: Floats) -> Floats:
    """log σ(z) without overflow for any z; keeps the shape."""
    logit = np.asarray(logit, np.float32)
    return np.minimum(logit, 0) - np.log1p(np.exp(-np.abs(logit)))


def retention_score(log_beta: Floats, position: Ints, seen: int, lookahead: int = 1) -> Floats:
    """Log of the predicted utility of entries, higher is kept longer.

    ``age = seen + 1 - position``, so the newest token has age 2 (the released code's convention).
    With a look-ahead of K steps the utility is ``Σ_{k<K} β^(age+k)``, whose log is
    ``age·log β + log((1 - β^K) / (1 - β))``; K = 1 gives ``age·log β``.

    Args:
        log_beta: any shape, float32, in [-inf, 0].
        position: same shape, 0-based true position in the stream.
        seen: tokens seen so far, n.
    """
    log_beta = np.asarray(log_beta, np.float32)
    age = (seen + 1 - np.asarray(position)).astype(np.float32)
    score = age * log_beta
    if lookahead > 1:
        score = score + log_geometric_sum(log_beta, lookahead)
    return score


def log_geometric_sum(log_beta: Floats, terms: int) -> Floats:
    """``log Σ_{k<terms} β^k``, stable for β near 0 and near 1 (where it tends to ``log terms``)."""
    log_beta = np.asarray(log_beta, np.float32)
    # below this the ratio of the two expm1 is `terms` to float32 precision, and 0/0 at log β = 0
    flat = np.abs(log_beta) < 1e-30
    safe = np.where(flat, np.float32(-1.0), log_beta)
    ratio = np.expm1(np.float32(terms) * safe) / np.expm1(safe)
    return np.log(np.where(flat, np.float32(terms), ratio))
