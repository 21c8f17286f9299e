"""Scores and selection on the device, the torch twin of :mod:`mlx_kvret.core.eviction`.

Candidates stand in rows, one row per group of competing heads. Nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import own_quotas
from mlx_kvret.core.pictures import Pictures


def retention_score(
    log_beta: torch.Tensor, position: torch.Tensor, seen: torch.Tensor | int, lookahead: int = 1
) -> torch.Tensor:
    """As :func:`mlx_kvret.core.retention.retention_score`; any shapes that broadcast, float32."""
    score = (seen + 1 - position).float() * log_beta
    return score + _log_geometric_sum(log_beta, lookahead) if lookahead > 1 else score


def _log_geometric_sum(log_beta: torch.Tensor, terms: int) -> torch.Tensor:
    flat = log_beta.abs() < 1e-30
    safe = torch.where(flat, -1.0, log_beta)
    ratio = torch.expm1(terms * safe) / torch.expm1(safe)
    return torch.where(flat, float(terms), ratio).log()


def static_score(
    config: EvictionConfig, keys: torch.Tensor, head: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """The part of a baseline's score that never changes: (R, H, T) of one layer's new tokens.

    ``keys`` (R, H, T, D), ``head`` (H,) flat heads within a sequence, ``position`` (R, T). ``keydiff`` has
    none: zeros.
    """
    shape = keys.shape[:3]
    if config.policy == "knorm":
        return -keys.float().norm(dim=-1)
    if config.policy == "recent":
        return position[:, None].float().expand(shape)
    if config.policy == "random":
        return random_score(position[:, None], head[:, None], config.policy_seed)
    return torch.zeros(shape, device=keys.device)


def random_score(position: torch.Tensor, head: torch.Tensor, seed: int) -> torch.Tensor:
    """As :func:`mlx_kvret.core.policies.random_score`: the "lowbias32" hash, in int64 for want of uint32."""
    word = 0xFFFFFFFF
    x = (position.long() * 0x9E3779B1) & word
    x = x ^ ((head.long() * 0x85EBCA77) & word) ^ (seed & word)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        # int64 products wrap modulo 2^64, whose low 32 bits are those of uint32
        x = ((x ^ (x >> shift)) * factor) & word
    x = x ^ (x >> 16)
    return (x >> 8).float() * 2.0**-24


def keydiff_score(keys: torch.Tensor, head: torch.Tensor, heads: int) -> torch.Tensor:
    """As :func:`mlx_kvret.core.policies.keydiff_score`; entries of a head ≥ ``heads`` do not count."""
    head = head.long()
    unit = _unit(keys.float())
    total = unit.new_zeros(heads + 1, keys.shape[-1])
    mean = _unit(total.index_add_(0, head.flatten(), unit.flatten(0, -2)))
    return -(unit * mean[head]).sum(-1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


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
    """Which candidates stay, as a mask; all arguments (groups, N). A ``head`` ≥ ``heads`` marks no entry.

    Groups may be those of several sequences, one sequence's after the other's.

    The rule is that of :func:`mlx_kvret.core.eviction.select` for groups that are due: protected entries
    first, then by score, ties to the newer token and then to the lower head; of these the first M·``size``.
    ``seen`` and ``budget``, M if it is not the configuration's, are one number or (groups, 1).
    """
    alive = head < heads
    must = must_stay(score, position, head, seen, config, heads)
    order = _order(score, must, alive, position, head)
    wanted = (config.budget if budget is None else budget) * size
    best = torch.arange(order.shape[1], device=order.device).expand_as(order) < wanted
    keep = torch.zeros_like(alive).scatter_(1, order, best) & alive
    if config.threshold is not None:
        keep = keep & (must | (score >= math.log(config.threshold)))
    return keep


def select_split(
    score: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    seen: int,
    config: EvictionConfig,
    heads: int,
    pictures: Pictures,
) -> torch.Tensor:
    """As :func:`select` for one sequence with the scope ``"modality"``; arguments (1, N).

    After protected entries come the best of text and of ``pictures``, as many as each one's quota.
    """
    alive = head < heads
    must = (position < config.sinks) | (position >= seen - config.window)
    marked, most = own_quotas(pictures, seen, config, heads)
    order = _order(score, torch.zeros_like(must), alive, position, head)
    seeing = torch.from_numpy(marked).to(score.device)[position.long().clamp(0, seen - 1)]
    first = must.clone()
    for own, quota in zip((~seeing, seeing), most, strict=True):
        listed = (own & alive & ~must).gather(1, order)
        chosen = listed & (listed.cumsum(1) <= quota)
        first |= torch.zeros_like(must).scatter_(1, order, chosen)
    order = _order(score, first, alive, position, head)
    keep = torch.zeros_like(alive).scatter_(1, order[:, : config.budget * heads], True) & alive
    if config.threshold is not None:
        keep = keep & (must | (score >= math.log(config.threshold)))
    return keep


def must_stay(
    score: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    seen: torch.Tensor | int,
    config: EvictionConfig,
    heads: int,
) -> torch.Tensor:
    """Protected entries, and each head's best; arguments as of :func:`select`."""
    must = (position < config.sinks) | (position >= seen - config.window)
    if config.min_per_head:
        order = _order(score, must, head < heads, position, head)
        must = must | (_rank_in_head(order, head) < config.min_per_head)
    return must


def _order(
    score: torch.Tensor, must: torch.Tensor, alive: torch.Tensor, position: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    """Indices of the candidates of each row, best first, (groups, N)."""
    tie = (position.long() << 32) - head.long()
    order = tie.argsort(dim=1, descending=True, stable=True)
    key = torch.where(alive, ascending_bits(score) + (must.long() << 32), -1)
    return order.gather(1, key.gather(1, order).argsort(dim=1, descending=True, stable=True))


def ascending_bits(score: torch.Tensor) -> torch.Tensor:
    """float32 to int64 in [0, 2^32) of the same order; NaN counts as the lowest, -0 as 0."""
    score = torch.where(score.isnan(), -math.inf, score) + 0.0
    bits = score.view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


def _rank_in_head(order: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Each candidate's place among those of its own head, (groups, N)."""
    place = torch.arange(head.shape[1], device=head.device).expand_as(order)
    by_head = order.gather(1, head.gather(1, order).argsort(dim=1, stable=True))
    sorted_head = head.gather(1, by_head)
    new = torch.ones_like(sorted_head, dtype=torch.bool)
    new[:, 1:] = sorted_head[:, 1:] != sorted_head[:, :-1]
    start = torch.where(new, place, 0).cummax(1).values
    return torch.zeros_like(order).scatter_(1, by_head, place - start)
