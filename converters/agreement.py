"""How much the entries kept by two sets of gates agree: what a lossy conversion may change, as a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.core.eviction import select
from mlx_kvret.core.retention import retention_score
from mlx_kvret.core.types import Array, Floats, Mask
from mlx_kvret.errors import ConfigError
from mlx_kvret.gates import RetentionGates

FRACTIONS = (2, 4, 8)
TOKENS = 512


@dataclass(frozen=True)
class Agreement:
    """Share of the entries kept by the reference that the other gates keep as well, at one budget.

    ``budget`` is M of ``tokens``; ``synthetic`` says that the inputs were :func:`synthetic_inputs`.
    """

    budget: int
    tokens: int
    share: float
    synthetic: bool


def agreement(
    reference: RetentionGates, other: RetentionGates, inputs: Sequence[Array], budget: int
) -> float:
    """Share of the entries kept by ``reference`` that ``other`` keeps too, at a global budget of M tokens.

    Args:
        inputs: attention inputs of a prompt, per layer (T, hidden).
        budget: M, below T (else nothing is evicted and the share is 1).
    """
    a, b = (_kept(_log_beta(gates, inputs), budget) for gates in (reference, other))
    return _share(a, b)


def agreements(
    reference: RetentionGates, other: RetentionGates, inputs: Sequence[Array] | None = None
) -> tuple[Agreement, ...]:
    """Agreement at 1/2, 1/4 and 1/8 of the tokens; without inputs on synthetic ones."""
    given = synthetic_inputs(reference.config) if inputs is None else inputs
    ours, theirs = _log_beta(reference, given), _log_beta(other, given)
    tokens = ours.shape[-1]
    rows = []
    for budget in (tokens // fraction for fraction in FRACTIONS):
        share = _share(_kept(ours, budget), _kept(theirs, budget))
        rows.append(Agreement(budget, tokens, share, inputs is None))
    return tuple(rows)


def synthetic_inputs(config: GateConfig, tokens: int = TOKENS, seed: int = 0) -> list[Floats]:
    """Stand-ins for a prompt: unit-normal vectors, RMS-normalised as an attention input is; L arrays."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((config.layers, tokens, config.hidden_size), np.float32)
    return list(x / np.sqrt((x * x).mean(-1, keepdims=True)))


def _share(reference: Mask, other: Mask) -> float:
    return float((reference & other).sum() / reference.sum())


def _log_beta(gates: RetentionGates, inputs: Sequence[Array]) -> Floats:
    """(L, H, T) in float32."""
    config = gates.config
    if len(inputs) != config.layers or any(
        x.ndim != 2 or x.shape != (len(inputs[0]), config.hidden_size) for x in inputs
    ):
        raise ConfigError(
            f"inputs have shapes {[tuple(x.shape) for x in inputs][:4]}; expected {config.layers} arrays "
            f"(tokens, {config.hidden_size}), one per layer"
        )
    columns = [np.array(gates.log_beta(layer, mx.array(x))).T for layer, x in enumerate(inputs)]
    return np.stack(columns).astype(np.float32)


def _kept(log_beta: Floats, budget: int) -> Mask:
    """Entries kept by one global compaction, as a flat mask over (L, H, T)."""
    layers, heads, tokens = log_beta.shape
    position = np.tile(np.arange(tokens), layers * heads)
    head = np.repeat(np.arange(layers * heads), tokens)
    score = retention_score(log_beta.reshape(-1), position, tokens)
    return select(score, position, head, tokens, EvictionConfig(budget, buffer=0), layers, heads)
