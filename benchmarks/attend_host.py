"""What attention of one layer costs the host in Python when it takes the Metal kernels: microseconds a call.

``python benchmarks/attend_host.py`` needs no Metal: a stand-in takes the place of MLX's kernels, so what MLX
itself does for a launch is not in it. The least of 30 runs, for other programs share the machine.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kernels.cases import batch_with, uniform  # noqa: E402

from mlx_kvret.mlx_backend.attention import attend  # noqa: E402
from mlx_kvret.mlx_backend.kernels import VARIABLE  # noqa: E402


def stand_in(**_: Any) -> Any:
    """Kernels that give the same arrays each time."""
    held: dict[Any, list[mx.array]] = {}

    def kernel(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        key = tuple(map(tuple, output_shapes))
        if key not in held:
            held[key] = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            mx.eval(held[key])
        return held[key]

    return kernel


def measure(rows: int, bits: Any, calls: int = 300) -> float:
    """Microseconds of a step of ``rows`` rows, 8 KV heads of 128, 4 query heads each."""
    view = batch_with([[100] * 8] * rows, [17] * rows, 128, mx.bfloat16, bits)
    queries = uniform(rows, 32, 1, 128, dtype=mx.bfloat16)
    mx.eval(queries)
    least = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(calls):
            attend(queries, view, 128**-0.5)
        least = min(least, (time.perf_counter() - start) / calls)
    return least * 1e6


def main() -> None:
    os.environ[VARIABLE] = "metal"
    mx.fast.metal_kernel = stand_in
    print("| rows | bits | µs |\n|---|---|---|")
    for rows in (1, 8):
        for bits in (None, "k8v4"):
            print(f"| {rows} | {bits or 16} | {measure(rows, bits):.1f} |", flush=True)


if __name__ == "__main__":
    main()
