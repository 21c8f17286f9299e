"""How a hooked model is compared with itself before it is accepted: with which tokens, and how closely.

A few ordinary tokens run through the model as it is and through its hooks. Where they differ by more than
rounding usually does, the model's own rounding is measured: it runs again with cached keys and values off by
one unit in the last place. In half precision some models differ by 1 % then and others by 30 %.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from .types import Array, Ints

# logits of so many last tokens are compared
COMPARED = 12
# how far hooks may be from the model, in its own rounding
_MARGIN = 4
# what a probe costs at most, unless a model is so large that a few tokens cost more
_OPERATIONS = 5e9
_LEAST, _MOST = 16, 1024


def ordinary_ids(vocabulary: int, count: int) -> Ints:
    """Tokens (count,) out of the middle of a vocabulary.

    Control tokens stand at its ends, on which half precision can be off by more than half; the later a token
    came into the vocabulary, the rarer it is.
    """
    low, high = vocabulary // 8, max(vocabulary // 2, vocabulary // 8 + 1)
    return np.random.default_rng(7).integers(low, high, count)


def probe_length(parameters: int, windows: Collection[int]) -> int:
    """How many tokens to probe a model with: more than its sliding windows hold, as far as that is quick.

    What a longer window would show does not depend on numbers: sliding-window layers keep the model's own
    caches and masks, and a window over a cache of all tokens is refused. Rotations are measured apart.
    """
    affordable = int(_OPERATIONS / (4 * max(parameters, 1)))
    wanted = max(windows, default=0) + 2 * _LEAST
    return max(_LEAST, min(wanted, affordable, _MOST))


def chunkings(tokens: int) -> tuple[list[int], list[int]]:
    """How the tokens are cut for the model as it is and for its hooks: the sizes of chunks.

    The last chunks of the second meet entries that have left the newest ones.
    """
    return [tokens], [tokens - COMPARED - 1, COMPARED, 1]


def distance(found: Array, expected: Array) -> float:
    """The norm of the difference as a share of the norm of what was expected."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))


def agrees(found: float, eps: float, rounding: Callable[[], float]) -> bool:
    """Whether hooked logits are the stock ones up to rounding.

    Args:
        found: their :func:`distance`.
        eps: relative rounding of the logits' type.
        rounding: measures how far the stock logits are from themselves when rounded differently.
    """
    usual = max(1e-4, 2 * eps)
    # a model that is further from itself than half cannot be told from a wrong one
    return found <= usual or found <= min(_MARGIN * rounding(), 0.5)
