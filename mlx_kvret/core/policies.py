"""Baselines that need no gates, as scores of the same shape as the learned one: higher is kept longer.

They exist so that any budget comparison is one flag away. Sinks and a recent window are protected by the
eviction plan, not here.
"""

from __future__ import annotations

import numpy as np

from .types import Floats, Ints


def recent_score(position: Ints) -> Floats:
    """Keep the newest (with protected sinks: StreamingLLM, arXiv 2309.17453). Exact below 2^24 tokens."""
    return np.asarray(position).astype(np.float32)


def random_score(position: Ints, head: Ints, seed: int) -> Floats:
    """A fixed priority in [0, 1) per (position, head): a uniform sample of the stream, whatever the chunking.

    ``head`` is the flat index layer·H + h. The mix is that of the "lowbias32" integer hash.
    """
    x = np.asarray(position).astype(np.uint32) * np.uint32(0x9E3779B1)
    x = x ^ (np.asarray(head).astype(np.uint32) * np.uint32(0x85EBCA77)) ^ np.uint32(seed & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = x ^ (x >> np.uint32(16))
    return (x >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def knorm_score(keys: Floats) -> Floats:
    """Keep keys of small norm (arXiv 2406.11430). ``keys`` (N, D) to (N,)."""
    keys = np.asarray(keys, np.float32)
    return -np.sqrt((keys * keys).sum(-1))


def keydiff_score(keys: Floats, head: Ints, heads: int) -> Floats:
    """Keep keys unlike the mean direction of their head's cached keys (KeyDiff, arXiv 2504.15364).

    ``keys`` (N, D), ``head`` (N,) flat head of each entry, ``heads`` their number L·H; returns (N,).
    """
    unit = _unit(np.asarray(keys, np.float32))
    mean = np.zeros((heads, unit.shape[-1]), np.float32)
    np.add.at(mean, head, unit)
    return -(unit * _unit(mean)[head]).sum(-1)


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), np.float32(1e-12))
