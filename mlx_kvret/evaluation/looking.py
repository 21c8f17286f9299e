"""What the reference engine keeps in each layer, and how it scores and selects: torch, many texts at once.

The entries of a layer stand in (B, H, C): B texts, H KV heads, C places of which some may be empty.
The rule is that of :func:`mlx_kvret.core.eviction.select`, text by text.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..core.config import EvictionConfig
from ..core.policies import random_score
from ..errors import ConfigError
from .methods import Method

KERNEL = 5
_BITS = 30


@dataclass
class Entries:
    """``keys`` and ``values`` (B, H, C, D); the others (B, H, C). ``attention`` is what was paid so far."""

    keys: torch.Tensor
    values: torch.Tensor
    log_beta: torch.Tensor
    position: torch.Tensor
    attention: torch.Tensor
    valid: torch.Tensor

    def joined(self, new: Entries) -> Entries:
        """These entries, then new ones."""
        names = [field.name for field in dataclasses.fields(self)]
        return Entries(*(torch.cat([getattr(self, name), getattr(new, name)], 2) for name in names))

    def keep(self, mask: torch.Tensor) -> Entries:
        """The entries of ``mask`` (B, H, C), in order, moved together."""
        width = int(mask.sum(2).max())
        first = (~mask).to(torch.uint8).sort(dim=2, stable=True).indices[:, :, :width]
        wide = first[..., None].expand(*first.shape, self.keys.shape[-1])
        narrow = (self.log_beta, self.position, self.attention, mask)
        return Entries(
            self.keys.gather(2, wide),
            self.values.gather(2, first[..., None].expand(*first.shape, self.values.shape[-1])),
            *(part.gather(2, first) for part in narrow),
        )


def evict(layers: list[Entries], method: Method, config: EvictionConfig, seen: int, useful: torch.Tensor) -> list[Entries]:
    """One compaction of every group that is due.

    Args:
        layers: entries of each layer.
        seen: tokens seen so far.
        useful: (B, T) marks positions that hold an answer; only the oracle looks.
    """
    heads = layers[0].keys.shape[1]
    size = {"global": len(layers) * heads, "layer": heads, "head": 1}[config.scope]
    kept: list[torch.Tensor] = []
    flat = [_flat(entries, layer, method, config, seen, useful) for layer, entries in enumerate(layers)]
    if config.scope == "global":
        rows = select(*(torch.cat(parts, 1) for parts in zip(*flat, strict=True)), seen, config, size)
        kept = list(rows.split([part[0].shape[1] for part in flat], 1))
    elif config.scope == "layer":
        kept = [select(*part, seen, config, size) for part in flat]
    else:
        for part, entries in zip(flat, layers, strict=True):
            count = entries.valid.shape[2]
            kept.append(select(*(x.reshape(-1, count) for x in part), seen, config, size))
    masks = [mask.view_as(entries.valid) for mask, entries in zip(kept, layers, strict=True)]
    return [entries.keep(mask) for entries, mask in zip(layers, masks, strict=True)]


def select(
    score: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    valid: torch.Tensor,
    seen: int,
    config: EvictionConfig,
    size: int,
) -> torch.Tensor:
    """Which entries stay, one row per text and group; all arguments and the result (rows, N)."""
    heads = int(head.max()) + 1
    if seen * heads >= 1 << _BITS:
        raise ConfigError(f"{seen} tokens in {heads} heads are too many to rank here; use another backend")
    must = (position < config.sinks) | (position >= seen - config.window)
    # unique keys: no two entries of a row share position and head, so that a threshold counts exactly
    tie = position * heads + (heads - 1 - head)
    key = torch.where(valid, (_ascending_bits(score) << _BITS) + tie, -1)
    if config.min_per_head:
        for index in torch.unique(head).tolist():
            own = torch.where(head == index, key + (must.long() << 32 + _BITS), -1)
            must = must | ((own >= _nth(own, config.min_per_head)) & (own >= 0))
    key = torch.where(valid, key + (must.long() << 32 + _BITS), -1)
    keep = (key >= _nth(key, config.budget * size)) & valid
    if config.threshold is not None:
        keep = keep & (must | (score >= math.log(config.threshold)))
    due = valid.sum(1, keepdim=True) >= (config.budget + config.buffer) * size
    return torch.where(due, keep, valid)


def _nth(key: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th largest of each row, (rows, 1); the smallest if there are fewer."""
    n = min(n, key.shape[1])
    return key.kthvalue(key.shape[1] - n + 1, dim=1, keepdim=True).values


def _ascending_bits(score: torch.Tensor) -> torch.Tensor:
    """float32 to int64 in [0, 2^32) of the same order; NaN counts as the lowest, -0 as 0."""
    score = torch.where(score.isnan(), -math.inf, score.float()) + 0.0
    bits = score.view(torch.int32).long()
    # the bits of negative numbers ascend as the numbers fall
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)


def _flat(
    entries: Entries, layer: int, method: Method, config: EvictionConfig, seen: int, useful: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, position, flat head and validity, each (B, H·C)."""
    texts, heads, _ = entries.valid.shape
    head = (layer * heads + torch.arange(heads, device=entries.valid.device))[None, :, None]
    parts = (
        score(entries, method, config, seen, useful, head),
        entries.position,
        head.expand_as(entries.valid),
        entries.valid,
    )
    a, b, c, d = (part.reshape(texts, -1) for part in parts)
    return a, b, c, d


def score(
    entries: Entries,
    method: Method,
    config: EvictionConfig,
    seen: int,
    useful: torch.Tensor,
    head: torch.Tensor,
) -> torch.Tensor:
    """The score of every entry under a method, (B, H, C) float32, higher is kept longer."""
    position = entries.position
    if method.policy == "learned":
        return (seen + 1 - position).float() * entries.log_beta + _look_ahead(entries, config.lookahead)
    if method.policy == "knorm":
        return -entries.keys.float().norm(dim=-1)
    if method.policy == "keydiff":
        unit = F.normalize(entries.keys.float(), dim=-1, eps=1e-12)
        mean = F.normalize((unit * entries.valid[..., None]).sum(2, keepdim=True), dim=-1, eps=1e-12)
        return -(unit * mean).sum(-1)
    if method.policy == "random":
        return _random(position, head, config.seed)
    if method.policy == "h2o":
        return entries.attention
    if method.policy == "snapkv":
        return F.max_pool1d(entries.attention * entries.valid, KERNEL, 1, KERNEL // 2)
    if method.policy == "oracle":
        places = position.flatten(1)
        return (useful.gather(1, places).view_as(position) * (1 << 22) + position).float()
    return position.float()


def _look_ahead(entries: Entries, terms: int) -> torch.Tensor | float:
    if terms == 1:
        return 0.0
    flat = entries.log_beta.abs() < 1e-30
    safe = torch.where(flat, -1.0, entries.log_beta)
    return torch.where(flat, float(terms), (terms * safe).expm1() / safe.expm1()).log()


def _random(position: torch.Tensor, head: torch.Tensor, seed: int) -> torch.Tensor:
    drawn = random_score(position.cpu().numpy(), head.expand_as(position).cpu().numpy(), seed)
    return torch.from_numpy(drawn).to(position.device)
