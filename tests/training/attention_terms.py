"""The sizes of what decayed attention and its gradients sum, for :func:`rounding.assert_norm_near`."""

from __future__ import annotations

from typing import Any

import numpy as np
from rounding import float64


def attention_terms(
    inputs: list[Any],
    starts: Any,
    scale: float,
    given: Any,
    sinks: Any = None,
    window: int | None = None,
    ends: Any = None,
) -> list[np.ndarray]:
    """Σ|terms| of the output and of each input's gradient, in float64.

    A softmax's weight w is off, relative to itself, by the rounding of its logit and by that of the sum over
    all: its terms are ``w·(1 + |logit| + Σ w·(1 + |logit|))``.

    Args:
        inputs: query (B, H·G, T, D), key (B, H, T, D), value (B, H, T, Dv) and, if decayed, log β (B, T, H).
        starts: (B, T), where a token's document begins.
        given: (B, H·G, T, Dv), the gradient of the output.
        sinks: (H·G,) logits without a value.
        ends: (B, T), where the token's picture ends; tokens with the same one see each other.
    """
    query, key, value, *fade = (float64(x) for x in inputs)
    (batch, heads, tokens, _), count = key.shape, query.shape[1]
    keys, values = (np.repeat(x, count // heads, 1) for x in (key, value))
    row, column = np.arange(tokens)[:, None], np.arange(tokens)
    begin = float64(starts)[:, None, :, None]
    if window:
        begin = np.maximum(begin, row - window + 1)
    seen = (column <= row) & (column >= begin)
    if ends is not None:
        seen = seen | (float64(ends)[:, None, :, None] == float64(ends)[:, None, None])
    age = np.maximum(row - column, 0)
    faded = age * np.repeat(fade[0].swapaxes(1, 2), count // heads, 1)[:, :, None] if fade else 0
    logits = np.where(seen, scale * query @ keys.swapaxes(2, 3) + faded, -np.inf)
    nothing = np.full((count, 1, 1), -np.inf) if sinks is None else float64(sinks)[:, None, None]
    weight = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    weight /= 1 + np.exp(nothing - np.logaddexp.reduce(logits, -1, keepdims=True))

    query, keys, values, given = map(np.abs, (query, keys, values, float64(given)))
    own = weight * (1 + scale * query @ keys.swapaxes(2, 3) + np.abs(faded))
    terms = own + weight * own.sum(-1, keepdims=True)
    out = terms @ values
    of_logits = terms * (given @ values.swapaxes(2, 3) + (given * out).sum(-1, keepdims=True))

    def per_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(batch, heads, -1, *x.shape[2:]).sum(2)

    of_key, of_value = scale * of_logits.swapaxes(2, 3) @ query, terms.swapaxes(2, 3) @ given
    found = [out, scale * of_logits @ keys, per_head(of_key), per_head(of_value)]
    return [*found, per_head((of_logits * age).sum(2)).swapaxes(1, 2)] if fade else found


def soft_size_terms(log_beta: Any, starts: Any, given: Any) -> list[np.ndarray]:
    """Σ|terms| of the soft size Σ_i β_i^(t - i) and of its gradient, in float64.

    Args:
        log_beta: (B, H, T); ``starts`` (B, T), where a token's document begins.
        given: like the soft size, the gradient of it.
    """
    log_beta, given = float64(log_beta), np.abs(float64(given))
    row, column = np.arange(log_beta.shape[-1])[:, None], np.arange(log_beta.shape[-1])
    visible, age = (
        (column <= row) & (column >= float64(starts)[:, None, :, None]),
        np.maximum(row - column, 0),
    )
    power = np.where(visible, np.exp(age * log_beta[:, :, None]), 0) * (
        1 + age * np.abs(log_beta[:, :, None])
    )
    return [power.sum(-1), (power * age * given[..., None]).sum(-2)]
