"""Kept entries in 16, 8 and 4 bits at equal bytes: what the demo's tasks and a real model lose or win.

At each M all widths have the bytes of M entries per KV head in 16 bits, accounts included; buffer and chunk
are those of that M for all of them. Writes benchmarks/results/bits.md.

python benchmarks/bits.py                           the demo model in bfloat16
python benchmarks/bits.py --model smollm2 --text examples/persuasion.txt --dtype float32 --samples 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret.core.bits import KVBits
from mlx_kvret.core.budget import BOOKKEEPING, CacheShape
from mlx_kvret.evaluation import open_bench, parse_methods
from mlx_kvret.evaluation.chunks import default_buffer, default_chunk
from mlx_kvret.evaluation.engine import PublicEngine
from mlx_kvret.evaluation.methods import parse_method
from mlx_kvret.evaluation.tasks import make_samples
from mlx_kvret.mlx_backend import hooks

RESULTS = Path(__file__).parent / "results"
WIDTHS: dict[str, KVBits] = {"16": None, "K8V8": 8, "K8V4": "k8v4", "K4V4": 4}
DEMO = {16: 512, 32: 512, 64: 512, 256: 2048}  # M, and tokens of the texts
REAL = {64: 512, 32: 384, 16: 256, 256: 1024}


def equal_budget(shape: CacheShape, budget: int, bits: KVBits) -> int:
    """The entries per KV head that take the bytes of ``budget`` in the model's float type."""
    return budget * (shape.entry_bytes + BOOKKEEPING) // (shape.kept_bytes(bits) + BOOKKEEPING)


def measure(
    name: str, tasks: dict[str, int], lengths: dict[int, int], text: Path | None, dtype: str
) -> Iterator[dict[str, Any]]:
    """Mean score of every task, M and width; ``tasks`` tells how many samples."""
    bench = open_bench(name, parse_methods(["full", "learned"]), (), "mlx", dtype=dtype)
    model, tokenizer = bench.engines[0].model, bench.tokenizer  # type: ignore[attr-defined]
    ((label, gates),) = bench.gates.items()
    attached = hooks.attachment(model)
    assert attached is not None
    # MLX's CPU device is slow in bfloat16: a larger model computes in float32, and has its bytes
    shape = replace(attached.layout.shape, itemsize=2)
    for task, count in tasks.items():
        for budget, length in lengths.items():
            samples = make_samples(task, length, count, 0, tokenizer, data=(text,) if text else ())
            engine = PublicEngine(model, tokenizer, default_chunk(budget), default_buffer(budget))
            engine.use_gates(gates)
            cells = [("all", parse_method("full"), 1)]
            for width, bits in WIDTHS.items():
                own = "learned" if bits is None else f"learned:kv_bits={bits}"
                cells.append((width, parse_method(own), equal_budget(shape, budget, bits)))
            for width, method, most in cells:
                scores = [outcome.score for outcome in engine.run(samples, method, most)]
                row = {"model": name, "gates": label, "task": task, "M": budget, "tokens": length}
                row |= {"width": width, "entries": most, "score": float(np.mean(scores)), "samples": count}
                print(json.dumps(row), flush=True)
                yield row


def report(rows: list[dict[str, Any]]) -> str:
    """The tables: a line for each M, a column for each width."""
    lines = [
        "# Kept entries in few bits, at equal bytes",
        "",
        "Made by `python benchmarks/bits.py`, on MLX's CPU device. Each line has the bytes of M entries per",
        "KV head in 16 bits, 16 bytes of accounts each included; in brackets the entries that fit. `all` is",
        "the full cache. Tasks: share of right answers; `text`: nats per token, less is better. The demo",
        "computes in bfloat16; smollm2 in float32, which MLX's CPU device is faster in, at the bytes of",
        "bfloat16.",
    ]
    groups = dict.fromkeys((row["model"], row["gates"], row["task"]) for row in rows)
    for model, gates, task in groups:
        own = [row for row in rows if (row["model"], row["gates"], row["task"]) == (model, gates, task)]
        count = f"{own[0]['samples']} sample{'s' if own[0]['samples'] > 1 else ''}"
        lines += ["", f"## {model}, {task} ({count}, gates {gates})", ""]
        lines += ["| M | tokens | all | " + " | ".join(WIDTHS) + " |", "|---" * (3 + len(WIDTHS)) + "|"]
        for budget in dict.fromkeys(row["M"] for row in own):
            found = {row["width"]: row for row in own if row["M"] == budget}
            if found.keys() != {"all", *WIDTHS}:
                continue
            cells = [f"{found[w]['score']:.3f} ({found[w]['entries']:,})" for w in WIDTHS]
            first = found["all"]
            lines.append(
                f"| {budget} | {first['tokens']:,} | {first['score']:.3f} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="a file that the task text reads")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--report", action="store_true", help="only write the tables anew")
    options = parser.parse_args()
    if options.report:
        (RESULTS / "bits.md").write_text(report(json.loads((RESULTS / "bits.json").read_text())))
        return
    names = ["text"] if options.text else ["many", "facts", "hostile"]
    tasks = dict.fromkeys(names, options.samples)
    lengths = REAL if options.text else DEMO
    stored = RESULTS / "bits.json"
    before = json.loads(stored.read_text()) if stored.exists() else []
    kept = [row for row in before if (row["model"], row["task"]) not in {(options.model, t) for t in tasks}]
    for row in measure(options.model, tasks, lengths, options.text, options.dtype):
        kept.append(row)
        stored.write_text(json.dumps(kept, indent=1) + "\n")
        (RESULTS / "bits.md").write_text(report(kept))


if __name__ == "__main__":
    main()
