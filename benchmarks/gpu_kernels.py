"""The Triton kernels against their naive twins: on a GPU compiled, without one in Triton's interpreter.

What must not be read is NaN, and what is computed twice must have the same bits. Part of gpu_check.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_timing import DEVICE, GPU

from mlx_kvret.core.bits import packings
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend.attention import naive_attend
from mlx_kvret.cuda_backend.pool import Pool, listing
from mlx_kvret.cuda_backend.selection import select
from mlx_kvret.cuda_backend.view import Chunks, ChunkView, LayerView, Places

Put = Callable[..., None]
# rows, KV heads, query heads of each, query tokens, places in the window, key and value width
SHAPES = [
    (1, 8, 4, 1, 129, 128, 128), (4, 8, 4, 1, 129, 128, 128), (1, 8, 4, 300, 420, 128, 128),
    (16, 8, 4, 1, 40, 128, 128), (1, 2, 8, 1, 1, 64, 64), (1, 4, 1, 8, 9, 96, 96),
    (1, 2, 16, 70, 70, 128, 128), (3, 3, 5, 1, 17, 80, 80), (1, 1, 16, 5, 30, 192, 128),
]  # fmt: skip
TINY = [(1, 2, 2, 1, 5, 32, 32), (2, 2, 2, 1, 5, 32, 32), (1, 2, 2, 9, 9, 32, 32)]
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the 2-norm; infinite where anything is not a number."""
    ours, expected = ours.double(), expected.double()
    found = float((ours - expected).norm() / expected.norm().clamp(min=1e-30))
    return found if found == found else float("inf")


def poisoned_view(
    shape: tuple[int, ...], dtype: torch.dtype, kv_bits: int | None = None, seed: int = 0
) -> LayerView:
    """Layer 1 of 2 with ragged heads, one of them empty; rows stand out of order among free slabs."""
    rows, heads, _, _, places, key_dim, value_dim = shape
    random, few = np.random.default_rng(seed), 300 if GPU else 9
    torch.manual_seed(seed)
    slabs, size = rows + (rows > 1), 2 * heads
    lengths = random.integers(0, few, (slabs, size))
    lengths[:, heads], lengths[:, -1] = 0, 3 * few
    pool = Pool(slabs, 1, size, DEVICE, packings(kv_bits, key_dim, value_dim))
    keys, values = (
        torch.randn(slabs, heads, places + 5, dim, device=DEVICE).to(dtype) for dim in (key_dim, value_dim)
    )
    pool.grow(int(-(-lengths.sum(1).max() // size)) + 1, keys, values)
    for index, own in enumerate(lengths):
        slab = pool.slab(index)
        flat = np.full(len(slab.owner) - 1, size)
        flat[random.permutation(len(flat))[: own.sum()]] = np.repeat(np.arange(size), own)
        slab.owner[:-1] = torch.from_numpy(flat).to(DEVICE, torch.int32)
        table, offsets = listing(slab.owner[None], size, len(slab.table))
        pool.take({"table": table, "offsets": offsets}, [index])
    used = pool.owner < size
    for which, (array, dim) in enumerate(((pool.keys, key_dim), (pool.values, value_dim))):
        noise = pool.stored(which, torch.randn(*used.shape, dim, device=DEVICE).to(dtype))
        # NaN in any type, as scales too
        array.view(torch.uint8).fill_(255)
        array[used] = noise[used]
    if rows == 1:
        return LayerView(pool, 0, 1, keys[:1, :, :places], values[:1, :, :places])
    which, before = random.permutation(slabs)[:rows], random.integers(0, places, rows)
    for slab in range(slabs):
        found = np.flatnonzero(which == slab)
        end = before[found[0]] + 1 if len(found) else 0
        keys[slab, :, end:], values[slab, :, end:] = torch.nan, torch.nan
    numbers = torch.from_numpy(np.stack([which, before, before + 1, before, before + 99, before + 99]))
    return LayerView(pool, 0, 1, keys, values, Places(pool, numbers, DEVICE))


def check_attention(put: Put, left: Callable[[], float], few: bool = False) -> None:
    """Decode and prefill attention; stops when time is out and says what was not tried."""
    from mlx_kvret.cuda_backend.kernels.decode_attention import decode_attention
    from mlx_kvret.cuda_backend.kernels.prefill_attention import prefill_attention

    shapes = (SHAPES[:3] if few else SHAPES) if GPU else TINY
    types = list(BOUNDS)[: 1 if few else 3] if GPU else [torch.float32]
    cases = [
        (dtype, shape, special)
        for dtype in types
        for special in ("plain", "sinks", "softcap", 8, 4)
        for shape in (shapes if special == "plain" else shapes[:3])
        # what is packed comes in groups
        if isinstance(special, str) or shape[5] % 32 == 0
    ]
    worst: dict[str, float] = {}
    for count, (dtype, shape, special) in enumerate(cases):
        if left() < 5:
            put("attention", not_tried=[str(case) for case in cases[count:]])
            break
        rows, heads, group, tokens, _, key_dim, _ = shape
        view = poisoned_view(shape, dtype, None if isinstance(special, str) else special)
        queries = torch.randn(rows, heads * group, tokens, key_dim, device=DEVICE).to(dtype)
        given: dict[str, Any] = {
            "sinks": torch.randn(heads * group, device=DEVICE).to(dtype) if special == "sinks" else None,
            "softcap": 2.0 if special == "softcap" else None,
        }
        sound = replace(view, keys=view.keys.nan_to_num(), values=view.values.nan_to_num())
        expected = naive_attend(queries, sound, key_dim**-0.5, **given)
        kernels = {"prefill": prefill_attention} if rows == 1 else {}
        if tokens * group <= 128 and tokens <= 8:
            kernels["decode"] = decode_attention
        for name, kernel in kernels.items():
            first, again = (kernel(queries, view, key_dim**-0.5, **given) for _ in range(2))
            error, what = difference(first, expected), f"{name} {dtype}"
            worst[what] = max(worst.get(what, 0.0), error)
            if error > BOUNDS[dtype]:
                put("attention", ok=False, kernel=name, dtype=str(dtype), shape=shape, special=special,
                    relative_error=error)  # fmt: skip
            if not torch.equal(first, again):
                put("attention", ok=False, kernel=name, dtype=str(dtype), shape=shape, two_runs="differ")
    for what, error in worst.items():
        put("attention", kernel=what, worst_relative_error=error)


def check_chunks(put: Put, left: Callable[[], float], few: bool = False) -> None:
    """Chunks of several rows in one launch; queries that are padding are NaN, and give zeros."""
    from mlx_kvret.cuda_backend.kernels.prefill_attention import prefill_attention

    rows, heads, group, dim = (5, 8, 4, 128) if GPU else (2, 2, 2, 32)
    tokens = [300, 1, 70, 9, 128][:rows] if GPU else [9, 1]
    ends = [n + 7 * row for row, n in enumerate(tokens)]
    begins = np.cumsum([0, *ends]).tolist()
    # the slabs backwards, places of padding before some rows' tokens, and a row that reads nothing
    told = [(rows - 1 - row, begins[row], ends[row], n, row % 2, row + 1) for row, n in enumerate(tokens)]
    for dtype in list(BOUNDS) if GPU else [torch.float32]:
        for kv_bits in (None, 8, 4):
            pool = poisoned_view((rows, heads, group, 1, 5, dim, dim), dtype, kv_bits).pool
            keys, values = torch.randn(2, 1, heads, begins[-1], dim, device=DEVICE).to(dtype)
            view = ChunkView(pool, 1, keys, values, Chunks(told, DEVICE))
            queries = torch.full((rows + 1, heads * group, max(tokens) + 1, dim), torch.nan, device=DEVICE)
            for _, _, _, n, first, row in told:
                queries[row, :, first : first + n] = torch.randn(heads * group, n, dim, device=DEVICE)
            queries = queries.to(dtype)
            out, again = (prefill_attention(queries, view, dim**-0.5) for _ in range(2))
            expected = torch.zeros_like(out)
            for at, part, own in view.views():
                expected[at, :, part] = naive_attend(queries[at, :, part], own, dim**-0.5)
            error, same = difference(out, expected), torch.equal(out, again)
            put("chunks of rows", ok=same and error <= BOUNDS[dtype], dtype=str(dtype), bits=kv_bits or 16,
                worst_relative_error=error)  # fmt: skip


def check_selection(put: Put, left: Callable[[], float], few: bool = False) -> None:
    """Radix selection with ties, infinities and NaN."""
    from mlx_kvret.cuda_backend.kernels.select import select_triton

    heads, tried, unequal = 288 if GPU else 6, 0, 0
    for seed in range(3 if few or not GPU else 60):
        if left() < 5:
            break
        random, scope = np.random.default_rng(seed), ("global", "layer", "head")[seed % 3]
        size = {"global": heads, "layer": 8 if GPU else 2, "head": 1}[scope]
        most = {"global": 60000, "layer": 900, "head": 120}[scope] if GPU else 40
        groups, count = heads // size, int(random.integers(1, most))
        options = ({}, {"min_per_head": 2}, {"sinks": 1, "window": 2}, {"threshold": 0.4})[seed % 4]
        config = EvictionConfig(budget=int(random.integers(3, 60)), buffer=1, scope=scope, **options)
        values = np.array([-np.inf, np.nan, -3.0, -1.5, -1e-6, -0.0, 0.0, 2.0], np.float32)
        score = (
            values[random.integers(0, 8, (groups, count))]
            if seed % 2
            else -random.random((groups, count), np.float32) * 5
        )
        cells = np.stack([random.permutation(max(count, 80 * size))[:count] for _ in range(groups)])
        head = cells % size + np.arange(groups)[:, None] * size
        head = np.where(random.random((groups, count)) < 0.2, heads, head)
        arrays = [torch.from_numpy(np.ascontiguousarray(a)).to(DEVICE) for a in (score, cells // size, head)]
        seen = torch.full((groups, 1), 10**6, device=DEVICE)
        rest = (seen, config, size, heads)
        tried += 1
        unequal += not torch.equal(select_triton(*arrays, *rest), select(*arrays, *rest))
    put("selection", ok=not unequal, tried=tried, unequal_to_twin=unequal)


def check_moving(put: Put, left: Callable[[], float], few: bool = False) -> None:
    """New tokens into windows, and survivors into the holes of the pool, whole or in few bits."""
    from mlx_kvret.cuda_backend.kernels import moving

    heads, dim, tokens = (8, 128, 40) if GPU else (2, 32, 5)
    dtype = torch.bfloat16 if GPU else torch.float32
    for kv_bits in (None, 8, 4):
        pools = [Pool(2, 1, heads, DEVICE, packings(kv_bits, dim, dim)) for _ in range(2)]
        new = torch.randn(2, 1, heads, tokens, dim, device=DEVICE).to(dtype)
        for pool in pools:
            pool.grow(4 * tokens, *new)
            pool.keys.zero_(), pool.values.zero_()
        keep = torch.rand(heads * tokens, device=DEVICE) < 0.4
        slots = torch.randperm(4 * heads * tokens, device=DEVICE)[: heads * tokens]
        slots += pools[0].slots
        moving.fill(pools[0], slots, keep, *new)
        pools[1].fill(slots[keep], *(a.flatten(0, 2)[keep] for a in new))
        same = all(torch.equal(*pair) for pair in zip(pools[0].arrays(), pools[1].arrays(), strict=True))
        put("fill", ok=same, bits=kv_bits or 16, equal_to_twin=same)
    slabs, places = torch.tensor([2, 0], device=DEVICE), torch.tensor([3, 1], device=DEVICE)
    windows = [torch.full((2, 3, heads, 6, dim), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    one = torch.randn(2, 2, heads, 1, dim, device=DEVICE).to(dtype)
    moving.append(*one, slabs, places, *windows[0])
    for wide, own in zip(windows[1], one, strict=True):
        wide.transpose(1, 2).index_put_((slabs, places), own[:, :, 0])
    same = torch.equal(windows[0].nan_to_num(9), windows[1].nan_to_num(9))
    put("append", ok=same, equal_to_twin=same)


def check_soft_size(put: Put, left: Callable[[], float], few: bool = False) -> None:
    """The training loss's kernel, forward and backward."""
    from mlx_kvret.cuda_backend.kernels.soft_size import naive_soft_size, soft_size

    tokens = 300 if GPU else 40
    values = -torch.rand(2, 3, tokens, device=DEVICE) * 0.1
    start = torch.zeros(2, tokens, dtype=torch.long, device=DEVICE)
    start[:, tokens // 3 :] = tokens // 3
    weight = torch.randn(2, 3, tokens, device=DEVICE)
    ours, twin = (values.clone().requires_grad_() for _ in range(2))
    made, expected = soft_size(ours, start, kernel=True), naive_soft_size(twin, start)
    (made * weight).sum().backward()
    (expected * weight).sum().backward()
    errors = [difference(made.detach(), expected.detach()), difference(ours.grad, twin.grad)]
    put("soft size", ok=max(errors) < 1e-4, forward=errors[0], gradient=errors[1])


def check_kernels(put: Put, left: Callable[[], float], few: bool = False) -> None:
    """All of them; one that fails does not stop the others."""
    for check in (check_attention, check_chunks, check_moving, check_selection, check_soft_size):
        try:
            check(put, left, few)
        except Exception as error:
            put(check.__name__, ok=False, error=f"{type(error).__name__}: {str(error)[:400]}")
            if "CUDA error" in str(error):
                raise
