"""What a talk of many pictures costs: ``python benchmarks/picture_talk.py [--backend torch]``.

The demo with eyes is shown a picture a turn, in one cache. 16 of the pictures state a fact, all have
decoys; after each a fact is asked for that was seen so far. Memory is what the cache holds after each turn,
and on MLX the most that all arrays of a turn took.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlx_kvret
from mlx_kvret.bitmap import Bitmap
from mlx_kvret.core.files import whole_file
from mlx_kvret.demo.pictures import DECOY, FACT, NAMES, PALETTE, cells, picture

SIDE, DECOYS, FACTS = 6, 3, 16
OUT = Path("benchmarks/results/picture_talk.md")


@dataclass(frozen=True)
class Turn:
    """After a turn: whether its answer was right, tokens seen, entries per head, bytes of the cache, and the
    most bytes of arrays during the turn (0 where that is not known)."""

    right: bool
    seen: int
    entries: float
    held: int
    peak: int


def shown(rng: np.random.Generator, facts: dict[int, int], fact: int | None) -> Bitmap:
    """A picture of decoys that are false of the known facts, and of one of these if it is new."""
    kinds, names, values = np.zeros((3, SIDE * SIDE), np.int64)
    first, *others = rng.permutation(SIDE * SIDE)[: 1 + DECOYS]
    if fact is not None:
        kinds[first], names[first], values[first] = FACT, fact, facts[fact]
    for place in others:
        name, value = int(rng.integers(len(NAMES))), int(rng.integers(len(PALETTE)))
        value = (value + 1) % len(PALETTE) if facts.get(name) == value else value
        kinds[place], names[place], values[place] = DECOY, name, value
    return picture(cells(rng, kinds, names, values), SIDE, SIDE)


def talk(model: Any, processor: Any, turns: int, seed: int = 0, **options: Any) -> list[Turn]:
    """Run a talk in one cache made with the options."""
    rng, facts, found = np.random.default_rng(seed), dict[int, int](), list[Turn]()
    cache = mlx_kvret.make_cache(model, **options)
    names = rng.permutation(len(NAMES))[: min(FACTS, turns)].tolist()
    new = {0, *rng.permutation(np.arange(1, turns))[: len(names) - 1].tolist()}
    for turn in range(turns):
        fact = names.pop() if turn in new else None
        if fact is not None:
            facts[fact] = int(rng.integers(len(PALETTE)))
        asked = list(facts)[int(rng.integers(len(facts)))]
        _reset_peak()
        said = mlx_kvret.generate(
            model,
            processor,
            f"<image> recall {NAMES[asked]}",
            images=[shown(rng, facts, fact).image],
            cache=cache,
            max_tokens=2,
        )
        kept = [len(head) for layer in cache.kept_positions() for head in layer]
        right = said.split()[:1] == [list(PALETTE)[facts[asked]]]
        found.append(Turn(right, cache.seen, sum(kept) / len(kept), cache.nbytes, _peak()))
    return found


def _reset_peak() -> None:
    if (mx := _mlx()) is not None:
        mx.reset_peak_memory()


def _peak() -> int:
    mx = _mlx()
    return 0 if mx is None else int(mx.get_peak_memory())


def _mlx() -> Any:
    import sys

    return sys.modules.get("mlx.core")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="mlx", choices=("mlx", "torch"))
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--budget", type=int, default=48)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    model, processor = mlx_kvret.load("demo-vision", backend=options.backend)
    rows = {
        f"learned, {options.budget} per head": {"budget": options.budget},
        "full cache": {"policy": "full"},
    }
    places = sorted({1, options.turns // 5, options.turns // 2, options.turns})
    lines = [
        "# A talk of many pictures",
        "",
        f"`python benchmarks/picture_talk.py --backend {options.backend}`: {options.turns} pictures of "
        f"{SIDE * SIDE} tokens, {min(FACTS, options.turns)} of which state a fact, a question after each "
        "about a fact seen so far, in one cache. Bytes of the cache after a turn; in brackets the "
        "most that all arrays of the turn took, weights included, where the backend tells.",
        "",
        "| after picture | " + " | ".join(map(str, places)) + " | right answers |",
        "|---" * (len(places) + 2) + "|",
    ]
    for name, own in rows.items():
        found = talk(model, processor, options.turns, **own)
        texts = [
            f"{found[n - 1].held / 1e3:,.0f} kB"
            + (f" ({found[n - 1].peak / 1e6:.1f} MB)" if found[0].peak else "")
            for n in places
        ]
        right = sum(turn.right for turn in found)
        lines.append(f"| {name} | " + " | ".join(texts) + f" | {right} of {len(found)} |")
        print(lines[-1], flush=True)
    with whole_file(options.out) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
