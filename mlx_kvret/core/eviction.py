"""Which entries are kept: the reference every backend is tested against.

An *entry* is one token in one KV head of one layer. Entries come as flat arrays of equal length N in any
order: ``score``, ``position`` (true 0-based position in the stream) and ``head`` (flat index layer·H + h).
"""

from __future__ import annotations

import math

import numpy as np

from .config import EvictionConfig
from .types import Floats, Ints, Mask


def heads_per_group(config: EvictionConfig, layers: int, kv_heads: int) -> int:
    """Heads that compete with each other: L·H (global), H (layer) or 1 (head)."""
    return {"global": layers * kv_heads, "layer": kv_heads, "head": 1}[config.scope]


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


def select(
    score: Floats, position: Ints, head: Ints, seen: int, config: EvictionConfig, layers: int, kv_heads: int
) -> Mask:
    """One compaction: which of N entries stay, as a mask (N,). Groups that are not due keep everything.

    Order within a group: protected entries first, and each head's own best until it has ``min_per_head``,
    then by score; ties go to the newer token, then to the lower (layer, head). Of this order the first
    M·(heads of the group) stay.
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

    order = np.lexsort((head, -position, -score, ~must_stay, group))
    keep = np.zeros(len(score), bool)
    keep[order] = _rank(group[order]) < config.budget * size
    if config.threshold is not None:
        keep &= must_stay | (score >= np.float32(math.log(config.threshold)))
    due = due_groups(np.bincount(head, minlength=layers * kv_heads), config, layers, kv_heads)
    return keep | ~due[group]


def _rank(sorted_group: Ints) -> Ints:
    """Place of each element within its run of equal values, from 0."""
    if len(sorted_group) == 0:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, sorted_group[1:] != sorted_group[:-1]])
    return np.arange(len(sorted_group)) - np.repeat(starts, np.diff(np.r_[starts, len(sorted_group)]))
