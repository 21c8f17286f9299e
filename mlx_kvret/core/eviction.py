"""Which entries are kept: the reference every backend is tested against.

An *entry* is one token in one KV head of one layer. Entries come as flat arrays of equal length N in any
order: ``score``, ``position`` (true 0-based position in the stream) and ``head`` (flat index layer·H + h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .config import EvictionConfig
from .pictures import Picture, is_picture
from .types import Floats, Ints, Mask


def heads_per_group(config: EvictionConfig, layers: int, kv_heads: int) -> int:
    """Heads that compete with each other: L·H (global, modality), H (layer) or 1 (head)."""
    return {"layer": kv_heads, "head": 1}.get(config.scope, layers * kv_heads)


def due_groups(counts: Ints, config: EvictionConfig, layers: int, kv_heads: int) -> Mask:
    """Groups whose entries have reached (M + B) per head.

    ``counts`` (L·H,) entries of each head; returns (groups,) in the order of the heads.
    """
    size = heads_per_group(config, layers, kv_heads)
    if config.policy == "full":
        return np.zeros(layers * kv_heads // size, bool)
    return np.asarray(counts).reshape(-1, size).sum(1) >= (config.budget + config.buffer) * size


def protected(position: Ints, seen: int, config: EvictionConfig) -> Mask:
    """Entries never evicted: the first ``sinks`` and the last ``window`` positions."""
    position = np.asarray(position)
    return (position < config.sinks) | (position >= seen - config.window)


def quotas(guarded: tuple[int, int], config: EvictionConfig, heads: int) -> tuple[int, int]:
    """Entries that text and pictures may keep beside their protected ones before the other gets any.

    ``guarded`` are the protected entries of text and of pictures, ``heads`` is L·H. Each has its part of
    M·L·H; protected entries count towards it, and what they need beyond it comes from the other's.
    """
    assert config.picture_share is not None
    wanted = config.budget * heads
    pictures = math.floor(config.picture_share * wanted + 0.5)
    free = max(0, wanted - sum(guarded))
    own = (wanted - pictures - guarded[0], pictures - guarded[1])
    return min(max(0, own[0]), free), min(max(0, own[1]), free)


def own_quotas(
    pictures: Sequence[Picture], seen: int, config: EvictionConfig, heads: int
) -> tuple[Mask, tuple[int, int]]:
    """Which of ``seen`` tokens are of pictures, and :func:`quotas` where sinks and a window are all that
    is protected, of ``heads`` heads."""
    marked = is_picture(pictures, seen)
    safe = protected(np.arange(seen), seen, config)
    guarded = int((safe & ~marked).sum()) * heads, int((safe & marked).sum()) * heads
    return marked, quotas(guarded, config, heads)


def select(
    score: Floats,
    position: Ints,
    head: Ints,
    seen: int,
    config: EvictionConfig,
    layers: int,
    kv_heads: int,
    pictures: Sequence[Picture] = (),
) -> Mask:
    """One compaction: which of N entries stay, as a mask (N,). Groups that are not due keep everything.

    Order within a group: protected entries first, and each head's own best until it has ``min_per_head``,
    then by score; ties go to the newer token, then to the lower (layer, head). Of this order the first
    M·(heads of the group) stay. With the scope ``"modality"`` the best of text and the best of ``pictures``
    up to their :func:`quotas` come right after the protected ones.
    With a threshold, unprotected entries below log α go as well. NaN counts as the lowest score.
    """
    score = np.where(np.isnan(score), -np.inf, np.asarray(score, np.float32)).astype(np.float32)
    position, head = np.asarray(position).astype(np.int64), np.asarray(head).astype(np.int64)
    size = heads_per_group(config, layers, kv_heads)
    group = head // size
    must_stay = protected(position, seen, config)
    if config.min_per_head:
        best_first = np.lexsort((-position, -score, ~must_stay, head))
        must_stay[best_first[_rank(head[best_first]) < config.min_per_head]] = True

    first = must_stay
    if config.scope == "modality":
        first = must_stay | _within_quotas(score, position, head, must_stay, seen, config, pictures, size)
    order = np.lexsort((head, -position, -score, ~first, group))
    keep = np.zeros(len(score), bool)
    keep[order] = _rank(group[order]) < config.budget * size
    if config.threshold is not None:
        keep &= must_stay | (score >= np.float32(math.log(config.threshold)))
    due = due_groups(np.bincount(head, minlength=layers * kv_heads), config, layers, kv_heads)
    return keep | ~due[group]


def _within_quotas(
    score: Floats,
    position: Ints,
    head: Ints,
    must_stay: Mask,
    seen: int,
    config: EvictionConfig,
    pictures: Sequence[Picture],
    heads: int,
) -> Mask:
    """The best unprotected entries of each modality, as many as its quota."""
    seeing = is_picture(pictures, seen)[position].astype(np.int64)
    guarded = (int((must_stay & (seeing == 0)).sum()), int((must_stay & (seeing == 1)).sum()))
    quota = np.array(quotas(guarded, config, heads))
    order = np.lexsort((head, -position, -score, must_stay, seeing))
    order = order[~must_stay[order]]
    first = np.zeros(len(score), bool)
    first[order] = _rank(seeing[order]) < quota[seeing[order]]
    return first


def _rank(sorted_group: Ints) -> Ints:
    """Place of each element within its run of equal values, from 0."""
    if len(sorted_group) == 0:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, sorted_group[1:] != sorted_group[:-1]])
    return np.arange(len(sorted_group)) - np.repeat(starts, np.diff(np.r_[starts, len(sorted_group)]))
