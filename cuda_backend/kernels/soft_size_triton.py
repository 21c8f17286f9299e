"""Triton kernels of the soft cache size, forward and backward. See :mod:`cuda_backend.kernels.soft_size`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64


@triton.jit
def soft_size_fwd_kernel(  # type: ignore[no-untyped-def]
    p_log_beta, p_starts, p_size, heads, tokens, BLOCK: tl.constexpr
):
    row = tl.program_id(1)
    base, document = row.to(tl.int64) * tokens, (row // heads).to(tl.int64) * tokens
    first = tl.program_id(0) * BLOCK
    token = first + tl.arange(0, BLOCK)
    b_start = tl.load(p_starts + document + token, mask=token < tokens, other=tokens)
    b_size = tl.zeros([BLOCK], tl.float32)
    begin = tl.load(p_starts + document + first) // BLOCK * BLOCK
    for place in range(begin, first + BLOCK, BLOCK):
        entry = place + tl.arange(0, BLOCK)
        b_log_beta = tl.load(p_log_beta + base + entry, mask=entry < tokens, other=0.0)
        age = token[:, None] - entry[None, :]
        counted = (age >= 0) & (entry[None, :] >= b_start[:, None])
        weight = tl.exp(tl.where(counted, age.to(tl.float32) * b_log_beta[None, :], float("-inf")))
        b_size += tl.sum(weight, 1)
    tl.store(p_size + base + token, b_size, mask=token < tokens)


@triton.jit
def soft_size_bwd_kernel(  # type: ignore[no-untyped-def]
    p_log_beta, p_starts, p_stops, p_gradient, p_result, heads, tokens, BLOCK: tl.constexpr
):
    row = tl.program_id(1)
    base, document = row.to(tl.int64) * tokens, (row // heads).to(tl.int64) * tokens
    first = tl.program_id(0) * BLOCK
    entry = first + tl.arange(0, BLOCK)
    b_log_beta = tl.load(p_log_beta + base + entry, mask=entry < tokens, other=0.0)
    b_result = tl.zeros([BLOCK], tl.float32)
    stop = tl.load(p_stops + document + tl.minimum(first + BLOCK, tokens) - 1)
    for place in range(first, stop, BLOCK):
        token = place + tl.arange(0, BLOCK)
        b_start = tl.load(p_starts + document + token, mask=token < tokens, other=tokens)
        b_gradient = tl.load(p_gradient + base + token, mask=token < tokens, other=0.0)
        age = token[:, None] - entry[None, :]
        counted = (age >= 0) & (entry[None, :] >= b_start[:, None])
        weight = tl.exp(tl.where(counted, age.to(tl.float32) * b_log_beta[None, :], float("-inf")))
        b_result += tl.sum(b_gradient[:, None] * age.to(tl.float32) * weight, 0)
    tl.store(p_result + base + entry, b_result, mask=entry < tokens)


def forward_triton(log_beta: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """(B, N, T) soft sizes from log β (B, N, T) and the starts of documents (B, T)."""
    log_beta, size = log_beta.contiguous(), torch.empty_like(log_beta, memory_format=torch.contiguous_format)
    batch, heads, tokens = log_beta.shape
    grid = (-(-tokens // BLOCK), batch * heads)
    starts = starts.to(torch.int32).contiguous()
    soft_size_fwd_kernel[grid](log_beta, starts, size, heads, tokens, BLOCK=BLOCK)
    return size


def backward_triton(log_beta: torch.Tensor, starts: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient for log β, same shape."""
    log_beta, gradient = log_beta.contiguous(), gradient.contiguous()
    result = torch.empty_like(log_beta)
    batch, heads, tokens = log_beta.shape
    grid = (-(-tokens // BLOCK), batch * heads)
    starts = starts.to(torch.int32).contiguous()
    stops = document_stops(starts).to(torch.int32).contiguous()
    soft_size_bwd_kernel[grid](log_beta, starts, stops, gradient, result, heads, tokens, BLOCK=BLOCK)
    return result


def document_stops(starts: torch.Tensor) -> torch.Tensor:
    """(B, T) the place behind each token's document."""
    tokens = starts.shape[-1]
    place = torch.arange(tokens, device=starts.device)
    begins = torch.where(starts == place, place, tokens)
    behind = torch.nn.functional.pad(begins[:, 1:], (0, 1), value=tokens)
    return behind.flip(-1).cummin(-1).values.flip(-1)
