"""Triton where there is a GPU, plain torch elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import replace

import torch

from mlx_kvret.core.config import EvictionConfig

from .. import attention, selection
from ..pool import Pool
from ..view import LayerView

# as many query tokens as decode attention takes, and rows of queries per KV head
FEW_TOKENS, FEW_ROWS = 8, 128


def attend(
    queries: torch.Tensor,
    view: LayerView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    length: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`cuda_backend.attention.naive_attend`; ``length`` (1,) places of the rectangle are in use."""
    if not enabled(queries):
        if length is not None:
            used = slice(0, int(length))
            view = replace(view, keys=view.keys[:, :, used], values=view.values[:, :, used])
        return attention.attend(queries, view, scale, sinks, softcap)
    from .attention import decode_attention, prefill_attention

    tokens, group = queries.shape[2], queries.shape[1] // view.kv_heads
    few = tokens <= FEW_TOKENS and tokens * group <= FEW_ROWS
    if few:
        return decode_attention(queries, view, scale, sinks, softcap, length=length)
    return prefill_attention(queries, view, scale, sinks, softcap)


def select(
    score: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    seen: torch.Tensor | int,
    config: EvictionConfig,
    size: int,
    heads: int,
) -> torch.Tensor:
    """As :func:`cuda_backend.selection.select`."""
    if not enabled(score):
        return selection.select(score, position, head, seen, config, size, heads)
    from .select import select_triton

    return select_triton(score, position, head, seen, config, size, heads)


def append(new: torch.Tensor, wide: torch.Tensor, length: torch.Tensor) -> None:
    """As :func:`cuda_backend.kernels.moving.append`."""
    if enabled(new):
        from .moving import append as write

        write(new, wide, length)
    else:
        start = int(length)
        wide[:, :, start : start + new.shape[2]] = new


def fill(
    pool: Pool, slots: torch.Tensor, survives: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Move the survivors (R·H·T,) among keys and values (R, H, T, D) into their pool slots (R·H·T,)."""
    if enabled(keys):
        from .moving import fill as move

        move(keys, values, slots, survives, pool.keys, pool.values)
    else:
        pool.fill(slots, keys.flatten(0, 2), values.flatten(0, 2))


def enabled(tensor: torch.Tensor) -> bool:
    """Whether kernels run for this tensor; warns once where a GPU has to do without."""
    if tensor.is_cuda and not _has_triton():
        warnings.warn(
            "triton is not installed, so attention runs in plain torch; run `pip install triton`",
            stacklevel=2,
        )
    return tensor.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
