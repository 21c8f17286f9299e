"""What the snapshots of conversations on one system prompt take, as copies and as references.

    python benchmarks/serve_snapshots.py --out benchmarks/results/serve_snapshots.md

Conversations of the demo, one after the other, each with its four snapshots, on a system prompt of 450
tokens. What stands in memory afterwards is counted: of MLX by itself, of torch the reachable storages.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mlx.core as mx
import torch
from serving.running import Asking, facts

import mlx_kvret
from mlx_kvret.core.files import whole_file
from mlx_kvret.serving.backend import backend_for
from mlx_kvret.serving.batched import Batched


def on_mlx() -> int:
    return int(mx.get_active_memory())


def on_torch() -> int:
    gc.collect()
    found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}.values())


def measured(
    name: str, shares: bool, facts_each: int, count: int, options: dict[str, int]
) -> tuple[int, int]:
    """Snapshots, and bytes that they take."""
    model, tokenizer = mlx_kvret.load("demo", backend=name)
    backend: Any = backend_for(model, tokenizer, dict(options))
    asking = Asking(backend, Batched(backend, 8), chunk=128, shares=shares)
    size = on_mlx if name == "mlx" else on_torch
    before = size()
    system = tokenizer.encode("remember Stella salmon " + facts(150))
    for at in range(count):
        text = facts(facts_each, at) + " recall Stella"
        ids = system + tokenizer.encode(text, add_special_tokens=False)
        marks = frozenset({len(system), len(ids) - 3, len(ids) - 1})
        asking.job(ids, marks, pinned={len(system)}, max_tokens=4)
        asking.run()
    return len(asking.scheduler.prefixes), size() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/serve_snapshots.md")
    options = parser.parse_args()
    given, rows = {"budget": 256, "buffer": 32}, []
    for name in ("mlx", "torch"):
        for facts_each in (1, 13):
            (_, copies), (count, shared) = (
                measured(name, shares, facts_each, options.conversations, given) for shares in (False, True)
            )
            rows.append(
                f"| {name} | {3 * facts_each} | {count} | {copies / 1e6:.2f} MB | {shared / 1e6:.2f} MB |"
            )
            print(rows[-1], flush=True)
    text = (
        "# Snapshots of conversations on one system prompt\n\n"
        f"By `python benchmarks/serve_snapshots.py`, {time.strftime('%Y-%m-%d')}: the demo, "
        f"M = {given['budget']}, B = {given['buffer']}, {options.conversations} conversations, bytes of "
        "arrays.\n\n"
        "| backend | words of a message | snapshots | as copies | as references |\n|---|---|---|---|---|\n"
    )
    with whole_file(options.out) as scratch:
        scratch.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
