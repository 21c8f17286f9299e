"""Attention of one layer over its kept entries and its newest tokens.

Kept entries are ragged: every KV head has its own number of them, from 0 up. They are all visible; among the
newest tokens attention is causal. One softmax runs over both. Rows with clocks of their own decode together.
:func:`naive_attend` is the specification; :func:`attend` pads heads of similar length, of whatever row, to a
common one and leaves the rest to torch's own attention.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from mlx_kvret.core.types import Ints

from .view import LayerView

# heads are padded to a common length while that costs less than half again of the work, or few entries
PADDING, FEW = 1.5, 2048


def naive_attend(
    queries: torch.Tensor,
    view: LayerView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    block: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of :func:`attend`, one sequence and KV head at a time, in float32."""
    rows, _, tokens, _ = queries.shape
    group, heads = queries.shape[1] // view.kv_heads, view.kv_heads
    lengths, visible = view.lengths(), view.visible(tokens, block)
    new_keys, new_values = view.newest()
    out = queries.new_empty(*queries.shape[:3], new_values.shape[-1])
    for place in range(rows * heads):
        row, head = divmod(place, heads)
        old_keys, old_values, _ = view.kept(np.array([place]), int(lengths[place]))
        keys = torch.cat([old_keys[0], new_keys[row, head]]).float()
        values = torch.cat([old_values[0], new_values[row, head]]).float()
        for query_head in range(head * group, (head + 1) * group):
            logits = queries[row, query_head].float() @ keys.T * scale
            if softcap:
                logits = torch.tanh(logits / softcap) * softcap
            hide = ~visible[row if len(visible) > 1 else 0]
            logits[:, lengths[place] :].masked_fill_(hide, -math.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[query_head].float().expand(tokens, 1)], 1)
            weights = logits.softmax(1)[:, : len(keys)]
            out[row, query_head] = (weights @ values).to(out.dtype)
    return out


def attend(
    queries: torch.Tensor,
    view: LayerView,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    block: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention (R, Hq, T, Dv) of ``queries`` (R, Hq, T, Dk); the newest tokens are theirs.

    ``sinks`` (Hq,) are logits of a null entry. ``softcap`` c turns logits z into ``c·tanh(z / c)``. ``block``
    (R, T, T) tells which of the queries' own tokens are visible, as inside of a picture those behind are too.
    """
    lengths, device, (keys, values) = view.lengths(), queries.device, view.newest()
    rows, query_heads, tokens, _ = queries.shape
    shape = (rows * view.kv_heads, query_heads // view.kv_heads, tokens, -1)
    queries, keys, values = queries.reshape(shape), keys.flatten(0, 1), values.flatten(0, 1)
    visible = view.visible(tokens, block)
    if len(visible) > 1:
        visible = visible.repeat_interleave(view.kv_heads, 0)
    sinks = None if sinks is None else sinks.view(view.kv_heads, -1).repeat(rows, 1)
    every = slice(None)
    out = queries.new_empty(*queries.shape[:3], values.shape[-1])
    for part in _parts(lengths):
        index = every if len(part) == len(lengths) else torch.from_numpy(part).to(device)
        seen = visible if len(visible) == 1 else visible[index]
        width = int(lengths[part].max())
        old = view.kept(part, width) if width else None
        null = None if sinks is None else sinks[index]
        out[index] = dense_attend(queries[index], keys[index], values[index], seen, old, scale, null, softcap)
    return out.view(rows, query_heads, tokens, -1)


def _parts(lengths: Ints) -> list[Ints]:
    """Heads to be padded together: all, where that is cheap, or those between two powers of two."""
    everyone = np.arange(len(lengths))
    if len(lengths) * lengths.max() <= PADDING * max(lengths.sum(), len(lengths)) + FEW:
        return [everyone]
    power = np.frexp(lengths)[1]
    return [everyone[power == p] for p in np.unique(power)]


def dense_attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    old: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scale: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Queries (n, G, T, Dk) of n KV heads to (n, G, T, Dv)."""
    if old is not None:
        real = old[2][:, None].expand(-1, queries.shape[2], -1)
        visible = torch.cat([real, visible.expand(len(real), -1, -1)], 2)
        keys, values = torch.cat([old[0], keys], 1), torch.cat([old[1], values], 1)
    keys, values, visible = keys[:, None], values[:, None], visible[:, None]
    if sinks is None and softcap is None:
        group = (-1, queries.shape[1], -1, -1)
        return F.scaled_dot_product_attention(
            queries, keys.expand(group), values.expand(group), visible, scale=scale
        )
    logits = (queries @ keys.transpose(2, 3)).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~visible, -math.inf)
    if sinks is not None:
        null = sinks.float()[:, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, null], 3)
    weights = logits.softmax(3)[..., : keys.shape[2]]
    return weights.to(values.dtype) @ values
