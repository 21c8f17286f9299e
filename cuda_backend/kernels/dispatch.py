"""Triton where there is a GPU, plain torch elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from mlx_kvret.core.config import EvictionConfig

from .. import attention, selection
from ..pool import Pool
from ..view import ChunkView, LayerView

# as many query tokens as decode attention takes, and rows of queries per KV head
FEW_TOKENS, FEW_ROWS = 8, 128


def attend(
    queries: torch.Tensor,
    view: LayerView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    block: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`cuda_backend.attention.naive_attend`."""
    # kernels look back only
    if block is not None or not enabled(queries.device):
        return attention.attend(queries, view, scale, sinks, softcap, block)
    from .decode_attention import decode_attention
    from .prefill_attention import prefill_attention

    tokens, group = queries.shape[2], queries.shape[1] // view.kv_heads
    few = view.rows is not None or (tokens <= FEW_TOKENS and tokens * group <= FEW_ROWS)
    if few:
        return decode_attention(queries, view, scale, sinks, softcap)
    return prefill_attention(queries, view, scale, sinks, softcap)


def attend_rows(
    queries: torch.Tensor,
    view: ChunkView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    block: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`attend` for chunks of several rows: queries (R, Hq, T, Dk), zeros for what is padding."""
    if block is None and enabled(queries.device):
        from .prefill_attention import prefill_attention

        return prefill_attention(queries, view, scale, sinks, softcap)
    out = queries.new_zeros(*queries.shape[:3], view.values.shape[-1])
    for at, part, own in view.views():
        seen = None if block is None else block[at, part, part]
        out[at, :, part] = attend(queries[at, :, part], own, scale, sinks, softcap, seen)
    return out


def select(
    score: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    seen: torch.Tensor | int,
    config: EvictionConfig,
    size: int,
    heads: int,
    budget: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """As :func:`cuda_backend.selection.select`."""
    if not enabled(score.device):
        return selection.select(score, position, head, seen, config, size, heads, budget)
    from .select import select_triton

    return select_triton(score, position, head, seen, config, size, heads, budget)


def fill(
    pool: Pool, slots: torch.Tensor, survives: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Move the survivors (n·H·T,) among keys and values (n, H, T, D) into slots (n·H·T,) of all slabs."""
    if enabled(keys.device):
        from .moving import fill as move

        move(pool, slots, survives, keys, values)
    else:
        pool.fill(slots, keys.flatten(0, 2), values.flatten(0, 2))


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    slabs: torch.Tensor,
    places: torch.Tensor,
    window_keys: torch.Tensor,
    window_values: torch.Tensor,
) -> None:
    """New keys and values (R, H, 1, D) go to ``places`` (R,) of ``slabs`` (R,) in windows (S, H, room, D)."""
    if enabled(keys.device):
        from .moving import append as move

        move(keys, values, slabs, places, window_keys, window_values)
        return
    for wide, new in ((window_keys, keys), (window_values, values)):
        wide.transpose(1, 2).index_put_((slabs, places), new[:, :, 0])


def enabled(device: torch.device) -> bool:
    """Whether kernels run on this device; warns once where a GPU has to do without."""
    if device.type == "cuda" and not _has_triton():
        warnings.warn(
            "triton is not installed, so attention runs in plain torch; run `pip install triton`",
            stacklevel=2,
        )
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
