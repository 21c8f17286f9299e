"""The soft size of a cache, ``S_t = Σ_{i <= t} β_i^(t - i)``, in memory linear in the number of tokens.

The MLX form of :mod:`cuda_backend.kernels.soft_size`; :func:`naive_soft_size` is its specification.
"""

from __future__ import annotations

import mlx.core as mx

from .attention import PackedMask, ages
from .blocks import after, with_gradient

# elements of one block: 32 MB in float32
BLOCK_ELEMENTS = 1 << 23


def soft_size(log_beta: mx.array, mask: PackedMask, elements: int | None = None) -> mx.array:
    """The soft size after every token, with a gradient for log β.

    Args:
        log_beta: (B, N, T) float32, at most 0; N heads of one layer or of all.
        mask: of the documents, whose entries are counted.
        elements: of a block, BLOCK_ELEMENTS unless given.

    Returns:
        (B, N, T) float32, between 1 and the number of the document's tokens so far.
    """
    most = (elements or BLOCK_ELEMENTS) // (log_beta.shape[0] * log_beta.shape[1])

    def forward(log_beta: mx.array) -> mx.array:
        sizes: list[mx.array] = []
        for tokens, entries in mask.blocks(most):
            mine = after(log_beta, sizes[-1] if sizes else None)
            sizes.append(_weights(mine, mask, tokens, entries).sum(-1))
        return mx.concatenate(sizes, -1)

    def backward(log_beta: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
        """``Σ_{t >= i} gradient_t·(t - i)·β_i^(t - i)`` for every entry i."""
        result = mx.zeros_like(log_beta)
        for tokens, entries in mask.blocks(most):
            weight = _weights(after(log_beta, result), mask, tokens, entries)
            part = (gradient[..., tokens, None] * weight * ages(tokens, entries)).sum(-2)
            result = result.at[..., entries].add(part)
        return result

    return with_gradient(forward, backward)(log_beta.astype(mx.float32))


def _weights(log_beta: mx.array, mask: PackedMask, tokens: slice, entries: slice) -> mx.array:
    """β_i^(t - i) (B, N, t, i), zero where t does not count i."""
    weight = mx.exp(log_beta[..., None, entries] * ages(tokens, entries))
    return mx.where(mask.block(tokens, entries)[:, None], weight, 0.0)


def naive_soft_size(log_beta: mx.array, mask: PackedMask) -> mx.array:
    """The definition, with the whole T×T matrix."""
    everything = slice(0, log_beta.shape[-1])
    place = mx.arange(everything.stop)
    age = mx.maximum(place[:, None] - place, 0).astype(log_beta.dtype)
    weight = mx.exp(age * log_beta[..., None, :])
    return (weight * mask.block(everything, everything)[:, None]).sum(-1)
