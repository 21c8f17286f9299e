"""The soft size of a cache, ``S_t = Σ_{i <= t} β_i^(t - i)``, in memory linear in the number of tokens.

Every β belongs to an entry, not to a step, so there is no recurrence: the work is T², the memory need not
be. :func:`soft_size` runs a Triton kernel on CUDA and torch in blocks elsewhere.
:func:`naive_soft_size` is the specification of both.
"""

from __future__ import annotations

from typing import Any

import torch

# elements of one block of the torch form
BLOCK_ELEMENTS = 1 << 22


def soft_size(log_beta: torch.Tensor, starts: torch.Tensor, kernel: bool | None = None) -> torch.Tensor:
    """The soft size after every token, with a gradient for log β.

    Args:
        log_beta: (B, N, T) float32, at most 0; N heads of one layer or of all.
        starts: (B, T) the place in the row at which each token's document begins, non-decreasing.
        kernel: whether to run the Triton kernel; by default on CUDA. On a CPU it needs triton's interpreter.

    Returns:
        (B, N, T) float32, between 1 and the number of the document's tokens so far.
    """
    return _SoftSize.apply(log_beta.float(), starts, log_beta.is_cuda if kernel is None else kernel)


class _SoftSize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_beta: torch.Tensor, starts: torch.Tensor, kernel: bool) -> torch.Tensor:
        ctx.save_for_backward(log_beta, starts)
        ctx.kernel = kernel
        if kernel:
            from .soft_size_triton import forward_triton

            return forward_triton(log_beta, starts)
        return forward_torch(log_beta, starts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_beta, starts = ctx.saved_tensors
        if ctx.kernel:
            from .soft_size_triton import backward_triton

            return backward_triton(log_beta, starts, gradient), None, None
        return backward_torch(log_beta, starts, gradient), None, None


def forward_torch(log_beta: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The torch form: blocks of tokens against all entries before them."""
    size = torch.empty_like(log_beta)
    for block, first in _blocks(log_beta, starts):
        weight, _ = _weights(log_beta, starts, block, first)
        size[..., block] = weight.sum(-1)
    return size


def backward_torch(log_beta: torch.Tensor, starts: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """``Σ_{t >= i} gradient_t·(t - i)·β_i^(t - i)`` for every entry i."""
    result = torch.zeros_like(log_beta)
    for block, first in _blocks(log_beta, starts):
        weight, age = _weights(log_beta, starts, block, first)
        part = torch.einsum("bnt,bnti->bni", gradient[..., block], weight.mul_(age))
        result[..., first : block.stop] += part
    return result


def _blocks(log_beta: torch.Tensor, starts: torch.Tensor) -> list[tuple[slice, int]]:
    """Slices of tokens, each with the first entry that any of them may count."""
    batch, heads, tokens = log_beta.shape
    step = max(1, BLOCK_ELEMENTS // (batch * heads * tokens))
    first = starts.amin(0).tolist()
    return [(slice(t, min(t + step, tokens)), first[t]) for t in range(0, tokens, step)]


def _weights(
    log_beta: torch.Tensor, starts: torch.Tensor, block: slice, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """β_i^(t - i) (B, N, t, i), zero where t does not count i, and the ages t - i (t, i)."""
    token = torch.arange(block.start, block.stop, device=log_beta.device)[:, None]
    entry = torch.arange(first, block.stop, device=log_beta.device)
    counted = (entry <= token) & (entry >= starts[:, block, None])
    age = (token - entry).clamp(min=0).float()
    weight = (log_beta[..., None, first : block.stop] * age).exp_()
    return weight.masked_fill_(~counted[:, None], 0.0), age


def naive_soft_size(log_beta: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The definition, with the whole T×T matrix."""
    place = torch.arange(log_beta.shape[-1], device=log_beta.device)
    age = place[:, None] - place
    counted = (age >= 0) & (place >= starts[..., None])
    weight = (age.clamp(min=0) * log_beta[..., None, :]).exp()
    return (weight * counted[:, None]).sum(-1)
