"""Retention gates of all layers in one batched product, against one layer after another: launches, CPU time.

    python benchmarks/mlx_gates.py [--write]

Gates of Qwen3-4B's depth in bfloat16, narrow so that a CPU can tell; 32 tokens' inputs wait, as they do while
decoding. Operations are those of MLX that are launched on a GPU, views left out; concatenating counts one for
each part. Building is what the host does before anything is computed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kernels.traffic import operations  # noqa: E402

from mlx_kvret.core.budget import CacheShape  # noqa: E402
from mlx_kvret.core.config import EvictionConfig, GateConfig  # noqa: E402
from mlx_kvret.mlx_backend.arena import Arena  # noqa: E402
from mlx_kvret.mlx_backend.gates import RetentionGates  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "mlx_gates.md"
LAYERS, HEADS, HIDDEN, WIDTH, TOKENS = 36, 8, 128, 64, 32


def least(call: Any, turns: int = 30) -> float:
    """Milliseconds of the thread."""
    times = []
    for _ in range(turns):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    gates = RetentionGates(GateConfig("rg10", LAYERS, HEADS, HIDDEN, WIDTH))
    gates.set_dtype(mx.bfloat16)
    shape = CacheShape(LAYERS, HEADS, 16, 16, 2, HIDDEN)
    arena = Arena(shape, EvictionConfig(budget=64, buffer=32), {}, gates)
    inputs = [mx.random.normal((1, HIDDEN)).astype(mx.bfloat16) for _ in range(LAYERS * TOKENS)]
    mx.eval(inputs, gates.parameters())

    def call(given: list[mx.array]) -> mx.array:
        return arena.gate_all([given[at : at + TOKENS] for at in range(0, len(given), TOKENS)])

    lines = [
        "# The gates of all layers at once",
        "",
        f"`python benchmarks/mlx_gates.py --write`, {datetime.date.today()}, MLX {mx.__version__} on a CPU: "
        f"{LAYERS} layers, {TOKENS} tokens whose inputs wait, hidden size {HIDDEN}, gates of {WIDTH}.",
        "",
        "| gates | operations | of them copies of inputs | a token | building, ms | with computing, ms |",
        "|--|--|--|--|--|--|",
    ]
    found = []
    for name in ("layer by layer", "all at once"):
        if name == "all at once":
            gates.stack(range(LAYERS))
        counts = operations(lambda *arrays: call(list(arrays)), *inputs)
        total = sum(counts.values())
        build, whole = least(lambda: call(inputs)), least(lambda: mx.eval(call(inputs)), 10)
        found.append(call(inputs))
        cells = (
            f"{total:,}",
            f"{counts['Concatenate']:,}",
            f"{total / TOKENS:.1f}",
            f"{build:.2f}",
            f"{whole:.1f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    same = bool(mx.array_equal(*found).item())
    lines += ["", f"Scores are {'the same, bit for bit' if same else 'not the same'}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
