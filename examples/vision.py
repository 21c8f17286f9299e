"""What one budget over layers, heads and modalities is worth: gates for the demo with eyes, and a page.

    python examples/vision.py          train gates, evaluate them, write benchmarks/results/vision.md
    python examples/vision.py --tiny   a few cells of a few samples, to see that it runs
    … --ship                           and the package gets the gates that validate best

Gates and cells that are there already are not made again, so it may be stopped at any time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "train_vision"))
from package import write_gates
from train_gates import STEPS, TOKENS, train
from vision_page import write_page

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.evaluation import Grid, Results, open_bench, open_results, parse_methods, run_grid

CHUNK, SEED, VALIDATION_SEED = 32, 2026, 7
BUDGETS = ("1/4", "1/8", "1/16", "1/32", "1/64")
FEW_BUDGETS = ("1/4", "1/16", "1/64")
BASELINES = ("full", "keydiff", "snapkv", "recent", "random")
SPLITS = tuple(f"learned:scope=modality,picture_share={share}" for share in (0.25, 0.5, 0.75))
# what the gates that are shipped ask for: a head without any entry attends to the question alone
KEPT = "learned-global:min_per_head=1"
FADED = "learned-global:threshold=0.2"
LEARNED = (KEPT, "learned-global", FADED, *SPLITS, "learned-layer", "learned-head")
FEW = (KEPT, FADED, SPLITS[1], "learned-head")
RATIOS = tuple(f"albums-{seen}-{16 - seen}" for seen in (16, 12, 8, 4, 0))
TEXT = "text/0"


@dataclass(frozen=True)
class Part:
    """Cells of one results file. ``samples`` is a share of all; ``chunk`` tokens are read at a time."""

    file: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    samples: float = 1.0
    labels: tuple[str, ...] | None = None
    seed: int = SEED
    chunk: int = CHUNK


@dataclass
class Run:
    """Where things are and how much of everything there is."""

    work: Path
    samples: int
    seeds: int
    steps: int
    batch: int

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(f"pictures/{seed}" for seed in range(self.seeds))

    def gates(self, label: str) -> Path:
        kind, _, seed = label.partition("/")
        return demo.GATES if label == TEXT else self.work / "gates" / (seed if kind == "pictures" else label)


def parts(tiny: bool) -> list[Part]:
    """Everything that is evaluated."""
    budgets = FEW_BUDGETS if tiny else BUDGETS
    short, long = (TOKENS,), (4 * TOKENS,)
    ours = ("learned-global", "learned-head")
    # a split can keep no minimum per head; the begin token kept in all heads gives either the same
    begun = ("learned-global:sinks=1", *(f"{split},sinks=1" for split in SPLITS))
    ratios = ("full", KEPT, "learned-global", *SPLITS, *begun)
    return [
        Part("main", ("albums",), short, budgets, (*BASELINES, *LEARNED)),
        Part("main", ("albums",), short, budgets, ours, labels=(TEXT,)),
        Part("validation", ("albums",), short, BUDGETS, (KEPT,), 0.5, seed=VALIDATION_SEED),
        Part("ratios", RATIOS, short, FEW_BUDGETS[1:], ratios, 0.5),
        Part("long", ("albums",), long, FEW_BUDGETS, (*BASELINES, *FEW), 0.2),
        *(Part(f"chunk-{c}", ("albums",), short, ("1/16",), ours, 0.5, chunk=c) for c in (8, 38, 64)),
    ]


def evaluate(run: Run, wanted: Sequence[Part]) -> dict[str, Results]:
    """The cells that are not there yet, of all results files."""
    found: dict[str, Results] = {}
    benches: dict[int, Any] = {}
    for part in wanted:
        if part.chunk not in benches:
            benches[part.chunk] = open_bench(
                demo.VISION_MODEL,
                parse_methods(["full"]),
                backend="reference",
                chunk=part.chunk,
                buffer=0,
                batch=run.batch,
            )
        samples = max(2, round(run.samples * part.samples))
        settings = {"model": "demo-vision", "samples": samples, "chunk": part.chunk, "buffer": 0}
        path = run.work / f"{part.file}.json"
        results = found.get(part.file) or open_results(path, settings | {"seed": part.seed}, {})
        gates = {label: load_gates(run.gates(label)) for label in part.labels or run.labels}
        methods = tuple(parse_methods(part.methods))
        grid = Grid(part.tasks, part.lengths, part.budgets, methods, samples, part.seed)
        found[part.file] = run_grid(grid, benches[part.chunk].engines, gates, results)
    return found


def validated(results: Results) -> dict[str, float]:
    """Mean accuracy of each set of gates over the budgets, best first."""
    scores: dict[str, list[float]] = {}
    for cell in results:
        scores.setdefault(cell.gates, []).extend(cell.scores)
    means = {label: round(sum(own) / len(own), 4) for label, own in scores.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="1 seed, 4 samples, 3 training steps")
    parser.add_argument("--ship", action="store_true", help="replace the gates of the package")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/vision"), help="gates and results files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vision.md"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tiny = options.tiny
    run = Run(
        options.work,
        samples=4 if tiny else options.samples,
        seeds=1 if tiny else options.seeds,
        steps=3 if tiny else STEPS,
        batch=100,
    )
    run.work.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed, label in enumerate(run.labels):
        if not run.gates(label).exists():
            train(demo.VISION_MODEL, seed, run.gates(label), run.steps)
    found = evaluate(run, parts(tiny))
    valid = validated(found["validation"])
    write_page(found, valid, options.out)
    print(f"wrote {options.out}")
    if options.ship:
        best = next(iter(valid))
        write_gates(demo.VISION_GATES, run.gates(best), {"validation_accuracy": valid})
        print(f"wrote {demo.VISION_GATES}: {best}")


if __name__ == "__main__":
    main()
