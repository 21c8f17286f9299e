"""Random schedules of rows of an arena that join, leave, split and are copied: each row against itself alone.

    python benchmarks/reliability/rows.py [--count 10000] [--seed 0] [--backend mlx torch]

Chunks are of random lengths, with padding that is poisoned; budgets and clocks differ by row. A fault is a
kept set that differs at all, or an output that differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]


def host(backend: str) -> Any:
    """The backend's arenas, as the tests drive them."""
    if backend == "mlx":
        from mlx_backend.host import OnMLX

        return OnMLX()
    from cuda.bare import Bare

    return Bare()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", nargs="+", default=["mlx", "torch"], choices=["mlx", "torch"])
    options = parser.parse_args()
    from cross.rows import schedule

    failed = False
    for backend in options.backend:
        start, found, faults = time.process_time(), host(backend), list[str]()
        for one in range(options.seed, options.seed + options.count):
            faults += schedule(found, one)[:1]
        spent = time.process_time() - start
        print(f"{backend}: {options.count:,} schedules, {len(faults)} faults, {spent:.0f} CPU-seconds")
        print("\n".join(faults[:20]), end="\n" if faults else "")
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
