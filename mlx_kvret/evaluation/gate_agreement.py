"""How much the entries kept by two sets of gates agree: what a lossy conversion may change, as a number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..core.config import EvictionConfig, GateConfig, Scope
from ..core.eviction import select
from ..core.retention import retention_score
from ..core.types import Array, Floats, Mask
from ..errors import ConfigError

FRACTIONS = (2, 4, 8)
TOKENS = 512


class Gates(Protocol):
    """Gates that run, on either backend."""

    config: GateConfig

    def log_beta(self, layer: int, x: Any) -> Any:
        """log β (T, H) of attention inputs (T, hidden)."""


@dataclass(frozen=True)
class Agreement:
    """Share of the entries kept by the reference that the other gates keep as well.

    ``shares`` maps budgets M (tokens per KV head, of ``tokens``) to shares in [0, 1]; ``inputs`` says in
    words what the gates were given.
    """

    shares: dict[int, float]
    tokens: int
    scope: Scope
    inputs: str

    def __str__(self) -> str:
        rows = "".join(f"\n  budget {budget:>5}  {share:.2%}" for budget, share in self.shares.items())
        return f"kept as by the source, {self.tokens} tokens, scope {self.scope} ({self.inputs}):{rows}"


def agreement(
    reference: Gates,
    other: Gates,
    inputs: Iterable[tuple[int, Array | Any]],
    what: str,
) -> Agreement:
    """Agreement of one compaction at 1/2, 1/4 and 1/8 of the tokens.

    The gates compete as they want to; if they say nothing, ``rg10`` gates globally, ``rg`` gates within their
    head, as each kind was trained to.

    Args:
        inputs: a gate layer and the attention inputs of a prompt there, (T, hidden), for each layer.
        what: what the inputs are, for the report.

    Raises:
        ConfigError: inputs of another shape, or none.
    """
    pairs = [_log_beta((reference, other), layer, x) for layer, x in inputs]
    tokens = {pair.shape[-1] for pair in pairs}
    if len(tokens) != 1 or tokens == {0}:
        raise ConfigError(
            f"inputs of {sorted(tokens)} tokens; expected as many for each layer, and at least one token"
        )
    (count,) = tokens
    wishes = reference.config.eviction
    scope = wishes.scope if wishes else None
    if scope is None:
        scope = "global" if reference.config.kind == "rg10" else "head"
    ours, theirs = np.stack(pairs, 1)
    shares = {}
    for budget in sorted({max(1, count // fraction) for fraction in FRACTIONS}, reverse=True):
        kept, also = _kept(ours, budget, scope), _kept(theirs, budget, scope)
        shares[budget] = float((kept & also).sum() / kept.sum())
    return Agreement(shares, count, scope, what)


def synthetic_inputs(config: GateConfig, tokens: int = TOKENS, seed: int = 0) -> Iterator[tuple[int, Floats]]:
    """Stand-ins for a prompt: normal vectors with a root mean square of 1, as attention inputs have."""
    random = np.random.default_rng(seed)
    for layer in range(config.layers):
        x = random.standard_normal((tokens, config.hidden_size), np.float32)
        yield layer, x / np.sqrt((x * x).mean(-1, keepdims=True))


def _log_beta(both: tuple[Gates, Gates], layer: int, x: Array | Any) -> Floats:
    """(2, H, T): log β of one layer by the two sets of gates."""
    hidden = both[0].config.hidden_size
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ConfigError(f"inputs of layer {layer} have shape {tuple(x.shape)}; expected (tokens, {hidden})")
    return np.stack([_run(gates, layer, x).T for gates in both])


def _run(gates: Gates, layer: int, x: Array | Any) -> Floats:
    if "torch" in {cls.__module__.partition(".")[0] for cls in type(gates).__mro__}:
        import torch

        with torch.no_grad():
            found: Floats = gates.log_beta(layer, torch.from_numpy(np.asarray(x))).numpy()
        return found
    import mlx.core as mx

    return np.array(gates.log_beta(layer, mx.array(x)))


def _kept(log_beta: Floats, budget: int, scope: Scope) -> Mask:
    """Entries kept by one compaction, as a flat mask over (L, H, T)."""
    layers, heads, tokens = log_beta.shape
    position = np.tile(np.arange(tokens), layers * heads)
    head = np.repeat(np.arange(layers * heads), tokens)
    score = retention_score(log_beta.reshape(-1), position, tokens)
    return select(score, position, head, tokens, EvictionConfig(budget, 0, scope), layers, heads)
