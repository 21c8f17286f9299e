"""Decoding rows side by side on MLX: bounded rows against mlx-lm's dense batch of the same kept length.

``python benchmarks/batch_decode.py`` (on Linux put OpenBLAS in front of MLX, as ``make bench`` does). The
models are random Qwen3 in float32, as in ``mlx_decode.py``, or the demo. ``dense`` is mlx-lm's BatchKVCache
with as many tokens as a bounded row keeps per head. All take turns for a few tokens at a time; figures are
medians over these turns, ratios medians of ratios. Host time is that of the Python thread while a pass is
built, which computes nothing. Bytes: what 100 copies of a prompt add, rows of uneven age against their
bound, and an arena after many joins and leaves.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_decode import SIZES, Contestant, build, load
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.mlx_backend import hooks
from mlx_kvret.mlx_backend.cache import BoundedCache


def filled(model: nn.Module, cache: list[Any], tokens: mx.array, chunk: int = 512) -> list[Any]:
    """A cache that has read tokens (N,)."""
    for at in range(0, len(tokens), chunk):
        mx.eval(model(tokens[None, at : at + chunk], cache=cache))
        mx.eval([entry.state for entry in cache])
    return cache


def bounded_rows(prompts: list[BoundedCache], count: int) -> BoundedCache:
    """A batch of ``count`` rows."""
    batch = copy.deepcopy(prompts[0])
    for row in range(1, count):
        batch.extend(copy.deepcopy(prompts[row % len(prompts)]))
    return batch


def decode(model: nn.Module, entrant: Contestant, rows: int, count: int) -> None:
    """One turn, one step ahead of the host, as mlx-lm's loop runs."""
    token = mx.zeros((rows, 1), mx.int32)
    start = time.perf_counter()
    with mx.stream(generation_stream):
        for _ in range(count):
            token = model(token, cache=entrant.cache)[:, -1:].argmax(-1)
            mx.async_eval(token)
        mx.eval(token)
    entrant.turns.append((time.perf_counter() - start) / count)


def host_time(model: nn.Module, cache: list[Any], rows: int, count: int = 40) -> float:
    """Seconds of Python per step, the least of several."""
    found = []
    for _ in range(count):
        token = mx.zeros((rows, 1), mx.int32)
        start = time.thread_time()
        with mx.stream(generation_stream):
            out = model(token, cache=cache)
            found.append(time.thread_time() - start)
            mx.eval(out)
    return min(found)


def speed(model: nn.Module, prompts: list[BoundedCache], options: argparse.Namespace) -> list[str]:
    """A line for each number of rows."""
    lines, vocabulary = [], 1000
    tokens = mx.array(np.random.default_rng(1).integers(0, vocabulary, options.budget))
    stock = filled(model, [KVCache() for _ in model.layers], tokens)
    for rows in options.rows:
        dense = Contestant([entry.merge([copy.deepcopy(entry) for _ in range(rows)]) for entry in stock])
        ours = Contestant(bounded_rows(prompts, rows))
        for turn in range(options.turns + 1):
            for entrant in (dense, ours):
                decode(model, entrant, rows, options.tokens)
                if turn == 0:
                    entrant.turns.clear()
        ratio = statistics.median(b / d for d, b in zip(dense.turns, ours.turns, strict=True))
        host = [1e3 * host_time(model, entrant.cache, rows) for entrant in (dense, ours)]
        arena = ours.cache.shared.arena.nbytes / (rows * bound(ours.cache))
        lines.append(
            f"| {rows} | {1e3 * statistics.median(dense.turns):.1f} | "
            f"{1e3 * statistics.median(ours.turns):.1f} | {ratio:.2f} | {host[0]:.2f} | {host[1]:.2f} | "
            f"{arena:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def bound(cache: BoundedCache) -> int:
    """Bytes that a row may take."""
    assert cache.shared is not None
    config = cache.shared.arena.config
    return int(cache.shared.shape.nbytes(config.budget, config.buffer))


def room(model: nn.Module, prompt: BoundedCache, joins: int) -> list[str]:
    """What copies, idle slabs, joins and leaves cost."""
    cache = copy.deepcopy(prompt)
    arena = cache.shared.arena
    alone, before = 1e3 * host_time(model, cache, 1), arena.nbytes
    copies = [cache.copy() for _ in range(100)]
    lines = [f"100 copies: {arena.nbytes / 1e6:.2f} MB, one {before / 1e6:.2f}"]
    for one in copies:
        mx.eval(model(mx.array([[1]]), cache=one))
    idle = 1e3 * host_time(model, cache, 1)
    lines.append(f"host time of a row: {alone:.2f} ms; beside {arena.slabs.count - 1} idle slabs {idle:.2f}")
    del copies, one
    batch, chance = copy.deepcopy(prompt), np.random.default_rng(0)
    before, most = batch.shared.arena.nbytes, 0
    for _ in range(joins):
        if batch.rows < 8 and chance.random() < 0.5:
            batch.extend(copy.deepcopy(prompt))
        elif batch.rows > 1:
            batch.filter([row for row in range(batch.rows) if row != batch.rows // 2])
        most = max(most, batch.shared.arena.nbytes)
    batch.filter([0])
    after = batch.shared.arena.nbytes
    lines.append(
        f"{joins:,} joins and leaves of up to 8 rows: {before / 1e6:.2f} MB before, {after / 1e6:.2f} after, "
        f"{most / 1e6:.2f} at most"
    )
    return lines


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="10M", help=f"{', '.join(SIZES)}, or a folder or known name (10M)")
    parser.add_argument("--budget", type=int, default=256, help="tokens per KV head (256)")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16], help="rows (1 8 16)")
    parser.add_argument("--turns", type=int, default=7, help="turns (7)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens in a turn (16)")
    parser.add_argument("--joins", type=int, default=10_000, help="joins and leaves (10,000)")
    options = parser.parse_args()
    model, attached = build(options.model) if options.model in SIZES else load(options.model)
    config = EvictionConfig.create(options.budget)
    prompts = []
    for seed in range(4):
        # of different lengths, so that rows compact at different times
        ids = np.random.default_rng(seed).integers(0, 1000, 2 * options.budget + 19 * seed)
        prompts.append(filled(model, hooks.new_cache(model, attached, config), mx.array(ids)))
    print("| rows | dense, ms | bounded, ms | ratio | host, dense | host, bounded | bytes / bound |")
    print("|---|---|---|---|---|---|---|")
    speed(model, prompts, options)
    print("\n".join(room(model, prompts[0], options.joins)))


if __name__ == "__main__":
    main()
