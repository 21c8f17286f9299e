"""How the torch backend's benchmarks take time: by replay over more memory than a cache of the GPU holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
# what the calls of one measurement read together, so that none finds its memory in the L2 cache (50 to 60 MB)
ROTATED = 300_000_000 if GPU else 1


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if GPU:
        torch.cuda.synchronize()


def per_call(calls: Sequence[Callable[[], Any]], least: float = 0.2) -> float:
    """Median seconds of one of ``calls``, which take turns: compiled before, captured in one graph on a GPU.

    Without a GPU they are called, and timed by the clock.
    """
    for call in calls:
        call()
    synchronize()
    times: list[float] = []
    if not GPU:
        for _ in range(3):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) / len(calls))
        return statistics.median(times)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    stop = time.perf_counter() + least
    while len(times) < 8 or time.perf_counter() < stop:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy on the device, of 1 GB (16 MB on a CPU)."""
    source = torch.empty(1 << (30 if GPU else 24), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / per_call([lambda: target.copy_(source)])


@torch.no_grad()
def per_token(
    step: Callable[[torch.Tensor], torch.Tensor], rows: int, tokens: int, turns: int = 5
) -> list[float]:
    """Seconds per token of turns of greedy decoding, after one that warms up and compiles."""
    token = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    times = []
    for turn in range(turns + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(tokens):
            token = step(token).argmax(-1, keepdim=True).view(rows, 1)
        synchronize()
        times += [(time.perf_counter() - start) / tokens] if turn else []
    return times


def fresh_peak() -> None:
    """Free what nobody holds, and count the peak of memory from now on."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The peak since :func:`fresh_peak`; None without a GPU, where nobody counts."""
    return torch.cuda.max_memory_allocated() if GPU else None


def device_line() -> str:
    """Card and versions, for the head of a table."""
    import platform

    import transformers

    none = f"no GPU: on the CPU ({platform.machine()}), captured steps called by a stand-in"
    card = torch.cuda.get_device_name() if GPU else f"{none}: times say nothing of a GPU"
    return f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, {DTYPE}"
