"""What the kernels move, counted access by access by the emulator."""

import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import metal_host
import mlx.core as mx
import numpy as np

from mlx_kvret.core import schedule
from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.mlx_backend import kernels
from mlx_kvret.mlx_backend.arena import Arena
from mlx_kvret.mlx_backend.bounded import Bounded
from mlx_kvret.mlx_backend.candidates import candidates_kernel
from mlx_kvret.mlx_backend.joining import new_row
from mlx_kvret.mlx_backend.kernels import compaction_plan, launch, score_select
from mlx_kvret.mlx_backend.kernels.attention import attend
from mlx_kvret.mlx_backend.kernels.prefill_attention import ROWS, tiled, tiled_rows

from .cases import batch_with, pool_with, uniform, view_with
from .test_chunks import chunks_with

ENTRIES = ("keys", "values", "recent_keys", "recent_values")


@dataclass
class Attention:
    """One layer's attention. Bytes are relative to what its entries' keys and values take as stored.

    ``entries``: of keys and values, each byte once per threadgroup that reads it. ``loaded``, ``stored``: the
    same of all buffers. ``spread``: most over least entries' bytes of a threadgroup, less 1.
    """

    threadgroups: int
    entries: float
    loaded: float
    stored: float
    spread: float
    memory: int

    @classmethod
    def of(cls, traffic, kernel, least):
        (main,) = traffic.of_kernel(kernel).launches
        work = main.work(*ENTRIES)
        return cls(
            len(work),
            traffic.total("loaded_per_threadgroup", *ENTRIES) / least,
            traffic.total("loaded_per_threadgroup") / least,
            traffic.total("stored_per_threadgroup") / least,
            work.max() / max(work.min(), 1) - 1,
            traffic.threadgroup_memory,
        )


def stored(pool):
    """Bytes of a kept entry's key and value."""
    return sum(a.shape[1] * a.dtype.size for a in (pool.keys, pool.values))


def layer(lengths, recent, group, tokens, size, dtype, bits=None):
    """A view, its queries and the bytes of its keys and values."""
    view = view_with(lengths, recent, size, size, dtype, layer=0, layers=1, bits=bits)
    queries = uniform(1, len(lengths) * group, tokens, size, dtype=dtype)
    newest = len(lengths) * recent * 2 * size * dtype.size
    return view, queries, sum(lengths) * stored(view.pool) + newest


def decode(lengths, recent, group, size, tokens=1, dtype=mx.float16, bits=None):
    """Attention of one step."""
    view, queries, least = layer(lengths, recent, group, tokens, size, dtype, bits)
    traffic = metal_host.count(lambda: attend(queries, view, size**-0.5))
    return Attention.of(traffic, "decode_attention", least)


def rows(lengths, recent, group, size, dtype=mx.float16, bits=None):
    """Attention of one step of a batch, in one launch; ``lengths`` (R, H), ``recent`` (R,)."""
    view = batch_with(lengths, recent, size, dtype, bits)
    queries = uniform(len(lengths), len(lengths[0]) * group, 1, size, dtype=dtype)
    newest = len(lengths[0]) * sum(recent) * 2 * size * dtype.size
    least = sum(map(sum, lengths)) * stored(view.pool) + newest
    traffic = metal_host.count(lambda: attend(queries, view, size**-0.5))
    return Attention.of(traffic, "decode_attention", least)


def prefill(lengths, tokens, group, size, dtype=mx.float16, bits=None):
    """Attention of a chunk by the kernel, and the blocks of query rows for which it reads entries anew."""
    view, queries, least = layer(lengths, tokens, group, tokens, size, dtype, bits)
    traffic = metal_host.count(lambda: tiled(queries, view, size**-0.5, True, None))
    return Attention.of(traffic, "prefill_attention", least), -(-group * tokens // ROWS)


def chunks(lengths, tokens, group, size, dtype=mx.float16, bits=None):
    """Attention of chunks of rows in one launch; ``lengths`` (R, H), ``tokens`` (R,) new ones of each.

    Returns it and the blocks of query rows of each row.
    """
    view = chunks_with(lengths, tokens, tokens, size, size, dtype, bits)
    queries = uniform(2 * len(lengths) + 1, len(lengths[0]) * group, max(tokens), size, dtype=dtype)
    newest = len(lengths[0]) * sum(tokens) * 2 * size * dtype.size
    least = sum(map(sum, lengths)) * stored(view.pool) + newest
    traffic = metal_host.count(lambda: tiled_rows(queries, view, size**-0.5, True, None))
    return Attention.of(traffic, "prefill_attention", least), [-(-group * n // ROWS) for n in tokens]


@dataclass
class Compaction:
    """``score_reads``: bytes loaded of the scores, over their size. ``moves``: entries written, over evicted.

    ``loaded``, ``stored``: bytes of all buffers per candidate, each byte once per threadgroup.
    ``launches`` of kernels.
    """

    score_reads: float
    loaded: float
    stored: float
    moves: float
    memory: int
    launches: int


def compaction(kept, new, heads, ties=False, rows=1):
    """A full pool of ``kept`` entries, of which as many stay, and ``new`` ones, all heads competing.

    Of each row; figures are per candidate of one of them.
    """
    tokens, heads_each = new // heads, kept // heads
    count = kept + new
    pool = pool_with([[heads_each] * heads] * rows, 32, 32, free=0)
    if ties:
        pool.retention = mx.floor(pool.retention * 2)
    newest = mx.floor(uniform(heads, rows * tokens) * 2) if ties else uniform(heads, rows * tokens)
    column = np.arange(rows * tokens, dtype=np.int32).reshape(rows, tokens)
    numbers = np.array([[row, 1000, 1000 + tokens, 1, 0, 0] for row in range(rows)], np.int32)
    wanted, seen, lowest = (
        np.full(rows, kept),
        np.full(rows, 1000 + tokens),
        np.full(rows, -np.inf, np.float32),
    )
    base = np.arange(rows, dtype=np.int32) * (kept + 1)

    def plan():
        score, _, position, head, must = candidates_kernel(pool, newest, column, numbers, False)
        keep = score_select.select(score, must, position, head, wanted, seen, heads, lowest)
        return keep, compaction_plan.destinations(keep, base, kept)

    traffic = metal_host.count(plan)
    with metal_host.installed():
        keep, slots = (np.array(array) for array in plan())
    written = slots[(slots - base[:, None]) != kept]
    assert len(set(written)) == len(written) and (keep.sum(1) == kept).all()
    return Compaction(
        traffic.total("loaded", "score") / (rows * count * 4),
        traffic.total("loaded_per_threadgroup") / (rows * count),
        traffic.total("stored_per_threadgroup") / (rows * count),
        len(written) / (~keep).sum(),
        traffic.threadgroup_memory,
        len(traffic.launches),
    )


# of MLX's operations those that launch nothing
VIEWS = {
    "Transpose",
    "Reshape",
    "ExpandDims",
    "Squeeze",
    "Slice",
    "Broadcast",
    "Flatten",
    "Unflatten",
    "AsStrided",
}


def operations(function, *inputs):
    """How often a call would launch each operation; concatenating counts once for each part."""
    found: Counter[str] = Counter()

    def look(entry):
        if entry.get("type") == "primitive" and entry["name"] not in VIEWS:
            found[entry["name"]] += len(entry["inputs"]) if entry["name"] == "Concatenate" else 1

    mx.export_function(look, function, *inputs)
    return found


def launches(rows, layers, kv_heads, together=True):
    """Of a compaction of ``rows`` that are due at once: launches of our kernels, and of these and MLX's own.

    They are counted in what MLX would launch, without carrying it out. Unless ``together`` one row compacts
    after the other.
    """
    shape = CacheShape(layers, kv_heads, 32, 32, 4, 8)
    config = EvictionConfig(budget=8, buffer=4)
    gates = SimpleNamespace(log_beta=lambda layer, x: -mx.abs(x[..., :kv_heads]), stacked=())
    arena = Arena(shape, config, {}, gates, slabs=rows)
    batch = Bounded(arena, [new_row(arena) for _ in range(rows)], batch=True)
    for tokens in (9, 1, 1, 1):
        batch.prepare(tokens)
        batch.reading, _ = batch.begin(tokens)
        for layer in range(layers):
            batch.reading.observe(layer, uniform(rows, tokens, 8))
            batch.reading.append(layer, *(uniform(rows, kv_heads, tokens, 32) for _ in "kv"))
        batch.finish()
        mx.eval(arena.newest())
    arena.score(wait=True)

    def settle(token):
        batch.settle()
        lookup = arena.pool.lookup
        return [*arena.pool.arrays(), lookup.table, lookup.offsets, *arena.recent.arrays(), token]

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {kernels.VARIABLE: "metal"}))
        stack.enter_context(patch.object(launch, "_evaluated", lambda arrays: True))
        stack.enter_context(patch.object(mx, "async_eval", lambda *arrays: None))
        if not together:
            stack.enter_context(patch.object(schedule, "TOGETHER", 1))
        found = operations(settle, mx.array(0))
    return found["CustomKernel"], sum(found.values())
