"""What the kernels move, counted access by access by the emulator."""

from dataclasses import dataclass

import metal_host
import mlx.core as mx
import numpy as np

from mlx_kvret.mlx_backend.kernels import compaction_plan, score_select
from mlx_kvret.mlx_backend.kernels.attention import attend
from mlx_kvret.mlx_backend.kernels.prefill_attention import ROWS, tiled

from .cases import batch_with, uniform, view_with

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
            work.max() / work.min() - 1,
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


@dataclass
class Compaction:
    """``score_reads``: bytes loaded of the scores, over their size. ``moves``: entries written, over evicted.

    ``loaded``, ``stored``: bytes of all buffers per candidate, each byte once per threadgroup.
    """

    score_reads: float
    loaded: float
    stored: float
    moves: float
    memory: int


def compaction(kept, new, heads, ties=False):
    """A full pool of ``kept`` entries, of which as many stay, and ``new`` ones, all heads competing."""
    count = kept + new
    score = mx.floor(uniform(1, count) * 2) if ties else uniform(1, count)
    index = mx.arange(count, dtype=mx.int32)[None]
    arrays = score, mx.zeros(score.shape, mx.bool_), index // heads, index % heads

    wanted, seen, lowest = np.array([kept]), np.array([count // heads + 1]), np.full(1, -np.inf, np.float32)

    def plan():
        keep = score_select.select(*arrays, wanted, seen, heads, lowest)
        return keep, compaction_plan.destinations(keep, np.zeros(1, np.int32), kept)

    traffic = metal_host.count(plan)
    with metal_host.installed():
        keep, slots = (np.array(array[0]) for array in plan())
    written = slots[slots != kept]
    assert len(set(written)) == len(written) and keep.sum() == kept
    return Compaction(
        traffic.total("loaded", "score") / score.nbytes,
        traffic.total("loaded_per_threadgroup") / count,
        traffic.total("stored_per_threadgroup") / count,
        len(written) / (~keep).sum(),
        traffic.threadgroup_memory,
    )
