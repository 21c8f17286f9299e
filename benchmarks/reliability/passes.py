"""Forward passes broken off at random places, and read again: what the cache holds then.

    python benchmarks/reliability/passes.py [--count 200] [--seed 0]

Per backend, an exception (an interrupt, a RuntimeError, a MemoryError) comes at a random call or at a random
line of the code that changes a cache, in a chunk of a prompt or in a decoded token. The cache must then be as
if nothing had happened, or refuse to go on.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from cross.breaking import KINDS, Count, attempt
from cross.sides import BACKENDS
from cross.test_broken_passes import SIZES, check, places, where


def run(count: int = 200, seed: int = 0) -> dict[str, dict[str, int]]:
    """``count`` passes on each backend; how each ended: undone, whole (not reached), lost, or wrong."""
    chance, found = random.Random(seed), {}
    for backend in BACKENDS:
        totals = {
            (size, way): places(backend, "qwen3", size, way)
            for size in SIZES.values()
            for way in ("calls", "lines")
        }
        ends: Counter[str] = Counter()
        for _ in range(count):
            size, way = chance.choice(list(totals))
            kind = chance.choice(KINDS) if way == "calls" else KeyboardInterrupt
            stop = Count(chance.randint(1, totals[size, way]), kind)
            try:
                ends[
                    check(backend, "qwen3", size, lambda s, act, w=way, c=stop: attempt(where(s, w, c), act))
                ] += 1
            except AssertionError as error:
                ends["wrong"] += 1
                print(f"{backend}, {size} tokens, {way} {stop.at}, {kind.__name__}: {error}", file=sys.stderr)
        found[backend] = dict(ends)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="passes on each backend (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (0)")
    options = parser.parse_args()
    for name, ends in run(options.count, options.seed).items():
        told = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
        print(f"{name}: {options.count} passes broken off: {told}, {ends.get('wrong', 0)} faults")
