"""Scores and selection on the device, the MLX twin of :mod:`mlx_kvret.core.eviction`.

Candidates stand in rows, one row per group of competing heads. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.config import EvictionConfig
from ..core.eviction import heads_per_group, own_quotas
from ..core.pictures import Pictures
from ..core.policies import random_score
from ..core.shares import Share
from ..core.types import Floats, Ints, Mask
from . import kernels
from .digits import ascending_bits, over_ranks, within_quotas
from .kernels import score_select


def retention_score(log_beta: mx.array, position: mx.array, seen: int, lookahead: int = 1) -> mx.array:
    """As :func:`mlx_kvret.core.retention.retention_score`; any shape, float32."""
    score = (seen + 1 - position).astype(mx.float32) * log_beta
    return score + _log_geometric_sum(log_beta, lookahead) if lookahead > 1 else score


def _log_geometric_sum(log_beta: mx.array, terms: int) -> mx.array:
    flat = mx.abs(log_beta) < 1e-30
    safe = mx.where(flat, -1.0, log_beta)
    ratio = mx.expm1(terms * safe) / mx.expm1(safe)
    return mx.log(mx.where(flat, float(terms), ratio))


def static_score(config: EvictionConfig, keys: mx.array, head: int, position: np.ndarray) -> mx.array:
    """The part of a baseline's score that never changes: (H, T) of one layer's new tokens.

    ``keys`` (H, T, D), ``head`` the layer's first flat head, ``position`` (T,). ``keydiff`` has none: zeros.
    """
    shape = keys.shape[:2]
    if config.policy == "knorm":
        return -mx.linalg.norm(keys.astype(mx.float32), axis=-1)
    if config.policy == "recent":
        return mx.broadcast_to(mx.array(position.astype(np.float32)), shape)
    if config.policy == "random":
        heads = head + np.arange(shape[0])
        return mx.array(random_score(position[None, :], heads[:, None], config.policy_seed))
    return mx.zeros(shape)


def keydiff_score(keys: mx.array, head: mx.array, heads: int) -> mx.array:
    """As :func:`mlx_kvret.core.policies.keydiff_score`; entries of a head ≥ ``heads`` do not count."""
    unit = _unit(keys.astype(mx.float32))
    mean = _unit(mx.zeros((heads + 1, keys.shape[-1])).at[head].add(unit))
    return -(unit * mean[head]).sum(-1)


def _unit(x: mx.array) -> mx.array:
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def select(
    score: mx.array,
    position: mx.array,
    head: mx.array,
    seen: int,
    config: EvictionConfig,
    size: int,
    heads: int,
    pictures: Pictures = (),
    share: Share | None = None,
    due: Mask | None = None,
) -> mx.array:
    """Which candidates stay, as a mask; all arguments (groups, N). A ``head`` ≥ ``heads`` marks no entry.

    The rule is that of :func:`mlx_kvret.core.eviction.select` for groups that are due: protected entries
    first, then by score, ties to the newer token and then to the lower head; of these the first M·``size``.
    With the scope ``"modality"`` the best of text and of ``pictures`` come before the rest.
    Where the groups that are ``due`` have heads of other ranks too, all ranks ask at once.
    """
    must = (position < config.sinks) | (position >= seen - config.window)
    if config.min_per_head:
        order = _order(score, must, head < heads, position, head, seen, heads)
        must = must | (_rank_in_head(order, head, heads) < config.min_per_head)
    lowest, groups = _lowest(config), len(score)
    wanted, clocks = np.full(groups, config.budget * size), np.full(groups, seen)
    none = np.full(groups, -math.inf)
    if share is not None and due is not None and share.spread(config):
        of_all = config.budget * heads_per_group(config, share.whole.layers, share.whole.kv_heads)
        first = must
        if config.scope == "modality":
            first = must | within_quotas(score, must, position, head, seen, config, share, pictures)
        keep = over_ranks(score, first, position, head, of_all, seen, share, due)
        return keep & (must | (score >= lowest)) if lowest > -math.inf else keep
    if config.scope != "modality":
        keep = _first(score, must, position, head, wanted, clocks, heads, np.full(groups, lowest))
        if share is not None and share.copies:
            keep = mx.array(share.ranks.first_mask(np.array(keep)))
        return keep
    first = must | _within_quotas(score, must, position, head, seen, heads, config, pictures)
    keep = _first(score, first, position, head, wanted, clocks, heads, none)
    if share is not None and share.copies:
        keep = mx.array(share.ranks.first_mask(np.array(keep)))
    return keep & (must | (score >= lowest)) if config.threshold is not None else keep


@dataclass(frozen=True)
class Asked:
    """What a row's entries are selected by; its groups that are not ``due`` (groups,) keep all of them."""

    seen: int
    config: EvictionConfig
    due: Mask
    pictures: Pictures = ()


def select_rows(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    asked: Sequence[Asked],
    size: int,
    heads: int,
    share: Share | None = None,
) -> mx.array:
    """As :func:`select` for the groups of several rows, one row's after the other's (R·groups, N).

    ``must`` marks what sinks and windows protect.
    """
    groups = len(score) // len(asked)
    if (
        share is None
        and asked[0].config.scope != "modality"
        and not any(a.config.min_per_head for a in asked)
    ):
        due = np.concatenate([one.due for one in asked])
        seen = np.repeat([one.seen for one in asked], groups)
        wanted = np.where(due, np.repeat([one.config.budget * size for one in asked], groups), score.shape[1])
        lowest = np.where(due, np.repeat([_lowest(one.config) for one in asked], groups), -math.inf)
        return _first(score, must, position, head, wanted, seen, heads, lowest)
    keep = []
    for at, one in enumerate(asked):
        own = slice(at * groups, (at + 1) * groups)
        told = one.seen, one.config, size, heads, one.pictures, share, one.due
        mine = select(score[own], position[own], head[own], *told)
        keep.append(mine if one.due.all() else mx.where(mx.array(one.due)[:, None], mine, head[own] < heads))
    return keep[0] if len(keep) == 1 else mx.concatenate(keep)


def _lowest(config: EvictionConfig) -> float:
    return -math.inf if config.threshold is None else math.log(config.threshold)


def _first(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    wanted: Ints,
    seen: Ints,
    heads: int,
    lowest: Floats,
) -> mx.array:
    """:func:`select_reference` of all groups, by kernels where there are any, else of a few after the other.

    ``wanted``, ``seen`` and ``lowest`` are (groups,).
    """

    def plain() -> mx.array:
        told = list(zip(wanted.tolist(), seen.tolist(), lowest.tolist(), strict=True))
        first = [at for at, own in enumerate(told) if at == 0 or own != told[at - 1]]
        found = []
        for begin, end in zip(first, [*first[1:], len(told)], strict=True):
            own, (most, clock, least) = slice(begin, end), told[begin]
            given = score[own], must[own], position[own], head[own]
            found.append(select_reference(*given, most, clock, heads, least))
        return found[0] if len(found) == 1 else mx.concatenate(found)

    return kernels.either(
        lambda: score_select.select(score, must, position, head, wanted, seen, heads, lowest), plain
    )


def select_reference(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    wanted: int,
    seen: int,
    heads: int,
    lowest: float,
) -> mx.array:
    """The first ``wanted`` of each row that ``must`` stay or score at least ``lowest``, by sorting all."""
    alive = head < heads
    order = _order(score, must, alive, position, head, seen, heads)
    keep = mx.zeros(score.shape, mx.bool_)
    keep = mx.put_along_axis(keep, order[:, :wanted], mx.array(True), axis=1) & alive
    if lowest > -math.inf:
        keep = keep & (must | (score >= lowest))
    return keep


def _within_quotas(
    score: mx.array,
    must: mx.array,
    position: mx.array,
    head: mx.array,
    seen: int,
    heads: int,
    config: EvictionConfig,
    pictures: Pictures,
) -> mx.array:
    """The best unprotected candidates of text and of pictures, as many as each one's quota, (1, N)."""
    marked, most = own_quotas(pictures, seen, config, heads)
    order = _order(score, mx.zeros(must.shape, mx.bool_), head < heads, position, head, seen, heads)
    seeing = mx.array(marked)[mx.minimum(position, seen - 1)]
    open_to_all = (head < heads) & ~must
    first = mx.zeros(must.shape, mx.bool_)
    for own, quota in zip((open_to_all & ~seeing, open_to_all & seeing), most, strict=True):
        sorted_own = mx.take_along_axis(own, order, axis=1)
        chosen = sorted_own & (mx.cumsum(sorted_own.astype(mx.int32), axis=1) <= quota)
        first = first | mx.put_along_axis(mx.zeros(must.shape, mx.bool_), order, chosen, axis=1)
    return first


def _order(
    score: mx.array,
    must: mx.array,
    alive: mx.array,
    position: mx.array,
    head: mx.array,
    seen: int,
    heads: int,
) -> mx.array:
    """Indices of the candidates of each row, best first, (groups, N)."""
    newest_first = (seen - position).astype(mx.int64) * (heads + 1) + head
    by_tie = mx.argsort(newest_first, axis=1)
    # every key is made unique by its place, so that no sort needs to be stable
    key = mx.where(alive, ascending_bits(score) + (must.astype(mx.int64) << 32) + 1, 0)
    key = (2**34 - mx.take_along_axis(key, by_tie, axis=1)) * score.shape[1]
    best_first = mx.sort(key + mx.arange(score.shape[1], dtype=mx.int64), axis=1)
    return mx.take_along_axis(by_tie, (best_first % score.shape[1]).astype(mx.uint32), axis=1)


def _rank_in_head(order: mx.array, head: mx.array, heads: int) -> mx.array:
    """Each candidate's place among those of its own head, (groups, N)."""
    count = head.shape[1]
    place = mx.broadcast_to(mx.arange(count, dtype=mx.int64), head.shape)
    rank = mx.put_along_axis(mx.zeros(head.shape, mx.int64), order, place, axis=1)
    by_head = mx.argsort(head.astype(mx.int64) * count + rank, axis=1)
    sorted_head = mx.take_along_axis(head, by_head, axis=1)
    new = mx.concatenate(
        [mx.ones((head.shape[0], 1), mx.bool_), sorted_head[:, 1:] != sorted_head[:, :-1]], axis=1
    )
    start = mx.cummax(mx.where(new, place, 0), axis=1)
    return mx.put_along_axis(mx.zeros(head.shape, mx.int64), by_head, place - start, axis=1)
