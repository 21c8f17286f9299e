"""Attention that a question pays to the words which hold its answer, as the text around them grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_kvret.core.types import Floats
from mlx_kvret.evaluation import Method, parse_method
from mlx_kvret.evaluation.diagnostics import diagnose
from mlx_kvret.evaluation.methods import budget_tokens

from .prose import Text

HEADS = 10
NAMES = ("attention, all heads", f"attention, {HEADS} heads that look there most", "entries kept")


def looking_heads(engine: Any, texts: Sequence[Text]) -> list[int]:
    """The query heads that pay the answer's words most with the full cache, of all layers."""
    full = parse_method("full")
    mass = np.mean([diagnose(engine, [text.sample], full, 1).mass for text in texts], 0)
    return [int(head) for head in np.argsort(-mass.ravel())[:HEADS]]


def attention(
    engine: Any, texts: Sequence[Text], heads: Sequence[int], method: Method, budget: str
) -> dict[str, list[float]]:
    """The means over a text's questions: attention on a fact's words, and the share of them that is kept."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for text in texts:
        tokens = 1 if method.full else budget_tokens(budget, text.sample.tokens)
        seen = diagnose(engine, [text.sample], method, tokens)
        mass: Floats = seen.mass.ravel()
        values = mass.mean(), mass[list(heads)].mean(), seen.found.mean()
        for name, value in zip(NAMES, values, strict=True):
            found[name].append(float(value))
    return found
