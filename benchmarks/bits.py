"""Kept entries in 16, 8 and 4 bits at equal bytes: what the demo's tasks and a real model lose or win.

At each M all widths have the bytes of M entries per KV head in 16 bits, accounts included; buffer and chunk
are those of that M for all of them. Writes benchmarks/results/bits.md.

python benchmarks/bits.py                   the demo model, on MLX
python benchmarks/bits.py --model smollm2   SmolLM2-135M-Instruct and its own gates, on torch; half an hour

The real model reads texts that no gates have seen, which are fetched from Debian, PyPI and npm.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret.core.bits import KVBits
from mlx_kvret.core.budget import BOOKKEEPING, CacheShape
from mlx_kvret.core.types import Floats
from mlx_kvret.evaluation import open_bench, parse_methods, text_pieces
from mlx_kvret.evaluation.chunks import default_buffer, default_chunk
from mlx_kvret.evaluation.engine import PublicEngine
from mlx_kvret.evaluation.methods import Method, parse_method
from mlx_kvret.evaluation.report import standard_error
from mlx_kvret.evaluation.samples import Sample, Turn
from mlx_kvret.evaluation.tasks import make_samples
from mlx_kvret.zoo import store

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "train_real")]
from abilities import asking  # noqa: E402
from abilities.prose import Text, texts_with_facts  # noqa: E402
from texts import measured_texts  # noqa: E402

RESULTS = Path(__file__).parent / "results"
WIDTHS: dict[str, KVBits] = {"16": None, "K8V8": 8, "K8V4": "k8v4", "K4V4": 4}
DEMO = {16: 512, 32: 512, 64: 512, 256: 2048}  # M, and tokens of the texts
REAL = {16: 256, 32: 384, 64: 512, 256: 1024}
# scores of every text, given an engine, a method and its budget
Task = Callable[[PublicEngine, Method, int], list[float]]


def equal_budget(shape: CacheShape, budget: int, bits: KVBits) -> int:
    """The entries per KV head that take the bytes of ``budget`` in 16 bits."""
    return budget * (shape.entry_bytes + BOOKKEEPING) // (shape.kept_bytes(bits) + BOOKKEEPING)


def demo_tasks(length: int, count: int, tokenizer: Any) -> dict[str, Task]:
    """The demo's own stories: the share of their questions that are answered."""
    return {
        name: scored(make_samples(name, length, count, 0, tokenizer)) for name in ("many", "facts", "hostile")
    }


def real_tasks(length: int, count: int, tokenizer: Any) -> dict[str, Task]:
    """Nats of held-out texts, and facts among their sentences that are completed; ``count`` of each kind."""
    kinds = measured_texts(store.downloads())
    pieces: list[tuple[int, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, text in sorted(kinds.items()):
            path = Path(folder, kind)
            path.write_text(text, encoding="utf-8")
            pieces += text_pieces([path], tokenizer, length, count)
    return {
        "text": scored([Sample((Turn(ids, scored=True),)) for ids in pieces]),
        "facts in prose": completed(texts_with_facts(kinds, tokenizer, length, count)),
    }


def scored(samples: list[Sample]) -> Task:
    """What the engine makes of samples."""
    return lambda engine, method, most: [outcome.score for outcome in engine.run(samples, method, most)]


def completed(texts: list[Text]) -> Task:
    """The share of a text's facts that are completed greedily once the answer is begun."""

    def task(engine: PublicEngine, method: Method, most: int) -> list[float]:
        return [_completed(engine, text, method, most) for text in texts]

    return task


def _completed(engine: PublicEngine, text: Text, method: Method, most: int) -> float:
    cache = engine.new_cache(method, most)
    engine.read(text.sample.turns[0].ids, cache, engine.pace.chunk(None if method.full else most))
    found = [asking.score(one, engine.forward(one.ids, copy.deepcopy(cache))) for one in text.asked]
    return float(np.mean([own[asking.COMPLETED] for own in found]))


def shape_of(engine: PublicEngine) -> CacheShape:
    """What decides how many bytes an entry takes."""
    if engine.name == "torch":
        from mlx_kvret.cuda_backend import hooks as torch_hooks

        return torch_hooks.shape_of(engine.model)
    from mlx_kvret.mlx_backend import hooks

    attached = hooks.attachment(engine.model)
    assert attached is not None
    return attached.layout.shape


def measure(name: str, count: int) -> Iterator[dict[str, Any]]:
    """Mean score of every task, M and width."""
    real = name != "demo"
    bench = open_bench(
        name, parse_methods(["full", "learned"]), (), "torch" if real else "mlx", dtype="bfloat16"
    )
    (found,) = bench.engines
    assert isinstance(found, PublicEngine)
    ((label, gates),) = bench.gates.items()
    for budget, length in (REAL if real else DEMO).items():
        engine = PublicEngine(
            found.model, bench.tokenizer, default_chunk(budget), default_buffer(budget), batch=9
        )
        engine.use_gates(gates)
        shape = shape_of(engine)
        cells = [("all", parse_method("full"), 1)]
        for width, bits in WIDTHS.items():
            own = "learned" if bits is None else f"learned:kv_bits={bits}"
            cells.append((width, parse_method(own), equal_budget(shape, budget, bits)))
        tasks = real_tasks if real else demo_tasks
        for task, run in tasks(length, count, bench.tokenizer).items():
            for width, method, most in cells:
                scores = run(engine, method, most)
                row = {"model": name, "gates": label, "task": task, "M": budget, "tokens": length}
                row |= {"width": width, "entries": most, "scores": scores}
                print(json.dumps(row), flush=True)
                yield row


def report(rows: list[dict[str, Any]]) -> str:
    """The tables: a line for each M, a column for each width."""
    lines = [
        "# Kept entries in few bits, at equal bytes",
        "",
        "Made by `python benchmarks/bits.py`, the demo on MLX's CPU device, SmolLM2-135M-Instruct on",
        "torch's, both in bfloat16. Each line has the bytes of M entries per KV head in 16 bits, 16 bytes of",
        "accounts each included; in brackets the entries that fit. `all` is the full cache. `text`: nats per",
        "token, less is better; else the share of right answers. ± is the standard error of the difference",
        "from 16 bits, paired.",
    ]
    groups = dict.fromkeys((row["model"], row["gates"], row["task"]) for row in rows)
    for model, gates, task in groups:
        own = [row for row in rows if (row["model"], row["gates"], row["task"]) == (model, gates, task)]
        lines += ["", f"## {model}, {task} ({len(own[0]['scores'])} samples, gates {gates})", ""]
        lines += ["| M | tokens | all | " + " | ".join(WIDTHS) + " |", "|---" * (3 + len(WIDTHS)) + "|"]
        for budget in dict.fromkeys(row["M"] for row in own):
            found = {row["width"]: row for row in own if row["M"] == budget}
            if found.keys() != {"all", *WIDTHS}:
                continue
            base = np.array(found["16"]["scores"])
            told = {width: _told(np.array(row["scores"]), base) for width, row in found.items()}
            cells = [told["all"], *(f"{told[width]} ({found[width]['entries']:,})" for width in WIDTHS)]
            lines.append(f"| {budget} | {found['all']['tokens']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told(scores: Floats, base: Floats) -> str:
    error = standard_error(scores - base)
    return f"{scores.mean():.3f}" + (f" ± {error:.3f}" if error > 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", choices=["demo", "smollm2"])
    parser.add_argument("--samples", type=int, help="of each task and kind of text (demo: 6, smollm2: 3)")
    parser.add_argument("--report", action="store_true", help="only write the tables anew")
    options = parser.parse_args()
    stored = RESULTS / "bits.json"
    kept = json.loads(stored.read_text()) if stored.exists() else []
    if not options.report:
        kept = [row for row in kept if row["model"] != options.model]
        for row in measure(options.model, options.samples or {"demo": 6, "smollm2": 3}[options.model]):
            kept.append(row)
            stored.write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "bits.md").write_text(report(kept))


if __name__ == "__main__":
    main()
