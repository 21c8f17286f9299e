"""What learned eviction is worth on the demo model: trains gates, evaluates them, writes a page.

    python examples/reproduce.py                   train the model as well, then everything
    python examples/reproduce.py --shipped-model   with the model of the package
    python examples/reproduce.py --tiny            a few cells of a few samples, to see that it runs
    … --shipped-model --ship                       and the package gets the gates that validate best

Gates, cells and models that are there already are not made again, so it may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "train_demo"))
from package import write_gates
from train_gates import MAIN, STEPS, VARIANTS, train

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.core.files import whole_file
from mlx_kvret.evaluation import (
    Cell,
    Grid,
    Results,
    entries,
    markdown,
    open_bench,
    open_results,
    parse_methods,
    run_grid,
)
from mlx_kvret.evaluation.diagnostics import dilution
from mlx_kvret.evaluation.plot import plot
from mlx_kvret.evaluation.report import Entry, table
from mlx_kvret.evaluation.results import cell_key
from mlx_kvret.evaluation.tasks import make_samples

TRAINED_LENGTH, CHUNK = 256, 32
SEED, VALIDATION_SEED = 2026, 7
BUDGETS = ("1/4", "1/8", "1/16", "1/32", "1/64", "1/128")
FEW_BUDGETS = ("1/4", "1/16", "1/64")
BASELINES = ("full", "recent", "random", "knorm", "keydiff", "snapkv", "h2o", "oracle")
# what gates score lower than this has faded to a millionth of its attention in training
FLOOR = "threshold=1e-6"
GLOBAL, HEAD = ("learned-global", f"learned-global:{FLOOR}"), ("learned-head", f"learned-head:{FLOOR}")
UNSEEN = ("hostile", "early", "many", "crowded", "bare", "turns", "copy")
# for two seeds of gates, and without any for the same two
OPTIONS = (
    "learned",
    "learned:lookahead=8",
    "learned:lookahead=64",
    "learned:min_per_head=2",
    "learned:sinks=2",
    "learned:window=8",
    "learned:threshold=1e-3",
    "learned:threshold=1e-9",
)


@dataclass(frozen=True)
class Part:
    """Cells of one results file: a grid without learned methods, or with those for some kinds of gates, all
    seeds of them or a few."""

    file: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    few: bool = False


def parts(tiny: bool) -> list[Part]:
    """Everything that is evaluated."""
    lengths = tuple(TRAINED_LENGTH * n for n in ((1, 2) if tiny else (1, 2, 4, 8)))
    budgets, middle = FEW_BUDGETS if tiny else BUDGETS, lengths[min(2, len(lengths) - 1)]
    one = ("facts",), (middle,), FEW_BUDGETS
    unseen = UNSEEN, (middle,), FEW_BUDGETS
    return [
        Part("main", ("facts",), lengths, budgets, BASELINES),
        Part("main", ("facts",), lengths, budgets, GLOBAL, ("shared",)),
        Part("main", ("facts",), lengths, budgets, GLOBAL[:1], ("separate",)),
        Part("main", ("facts",), lengths, budgets, HEAD, ("per-head",)),
        Part("unseen", *unseen, ("full", "recent", "keydiff", "snapkv")),
        Part("unseen", *unseen, GLOBAL, ("shared",)),
        Part("unseen", *unseen, HEAD, ("per-head",)),
        Part("ablations", *one, ("full",)),
        Part("ablations", *one, ("learned-global", "learned-head", "learned-layer"), MAIN),
        Part("ablations", *one, ("learned-global",), tuple(name for name in VARIANTS if name not in MAIN)),
        Part("ablations", *one, OPTIONS, ("shared",), few=True),
    ]


@dataclass
class Run:
    """Where things are and how much of everything there is."""

    work: Path
    model: Path
    samples: int
    seeds: int
    few_seeds: int
    steps: int
    batch: int
    tiny: bool

    def labels(self, kinds: tuple[str, ...], few: bool = False) -> list[str]:
        """Labels of the sets of gates of these kinds, one per seed; a few of the main kinds if wished."""
        counts = {k: self.seeds if k in MAIN and not few else self.few_seeds for k in kinds}
        return [f"{k}/{s}" for k in kinds for s in range(counts[k])]

    def gates(self, label: str) -> Path:
        return self.work / "gates" / label


def train_all(run: Run, pool: ProcessPoolExecutor) -> None:
    """Train the gates that are not there yet."""
    labels = [label for label in run.labels(tuple(VARIANTS)) if not run.gates(label).exists()]
    jobs = []
    for label in labels:
        name, seed = label.split("/")
        jobs.append(pool.submit(train, str(run.model), name, int(seed), str(run.gates(label)), run.steps))
    for job in tqdm(as_completed(jobs), total=len(jobs), unit="gates"):
        job.result()


def evaluate(
    run: Run,
    chosen: list[Part],
    pool: ProcessPoolExecutor,
    samples: int,
    seed: int,
    known: Results | None = None,
) -> Results:
    """Run the cells of one results file that are not there yet, each in a worker process.

    What ``known`` holds with at least as many samples is taken from there: the first ones are the same.
    """
    model = "shipped" if run.model == demo.MODEL else "trained"
    settings = {"model": model, "samples": samples, "seed": seed, "chunk": CHUNK, "buffer": 0}
    results = open_results(run.work / f"{chosen[0].file}.json", settings, {})
    jobs, order = [], list[str]()
    for part in chosen:
        methods = tuple(parse_methods(part.methods))
        grid = Grid(part.tasks, part.lengths, part.budgets, methods, samples, seed)
        for task, length, budget, method, label in grid.cells(run.labels(part.kinds, part.few)):
            key = cell_key(task, length, budget, method.name, label)
            order.append(key)
            if known and key in known.cells and key not in results.cells:
                results.add(replace(known.cells[key], scores=known.cells[key].scores[:samples], seconds=0.0))
            if key not in results.cells:
                budgets = part.budgets[:1] if method.full else (budget,)
                alone = replace(grid, tasks=(task,), lengths=(length,), budgets=budgets, methods=(method,))
                jobs.append(pool.submit(run_cell, run, alone, label))
    for job in tqdm(as_completed(jobs), total=len(jobs), unit="cell", desc=chosen[0].file):
        results.add(job.result())
    # not in the order in which workers were done
    results.cells = {key: results.cells[key] for key in order}
    results.save()
    return results


_benches: dict[Path, Any] = {}


def bench(run: Run) -> Any:
    """The process's own model."""
    if run.model not in _benches:
        import torch

        torch.set_num_threads(1)
        _benches[run.model] = open_bench(
            run.model, parse_methods(["full"]), backend="reference", chunk=CHUNK, buffer=0, batch=run.batch
        )
    return _benches[run.model]


def run_cell(run: Run, grid: Grid, label: str) -> Cell:
    """One cell, in a worker process."""
    gates = {label: load_gates(run.gates(label))} if label else {}
    (cell,) = run_grid(grid, bench(run).engines, gates, Results({}), progress=False)
    return cell


def diagnose(run: Run, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Attention on the useful entries, full against evicted, with the first set of shared gates."""
    path = run.work / "dilution.json"
    if path.exists():
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    engine, rows = bench(run).reference, []
    engine.use_gates(load_gates(run.gates("shared/0")))
    (method,) = parse_methods(["learned"])
    for length in lengths:
        samples = make_samples("facts", length, max(2, run.samples // 8), SEED)
        rows.append({"length": length, **dilution(engine, samples, method, length // 16)})
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return rows


def validation(results: Results) -> dict[str, float]:
    """Mean accuracy of each set of gates over budgets, best first."""
    scores: dict[str, list[float]] = {}
    for cell in results:
        scores.setdefault(cell.gates, []).extend(cell.scores)
    means = {label: round(sum(own) / len(own), 4) for label, own in scores.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def write_page(
    run: Run, main: Results, unseen: Results, ablations: Results, valid: dict[str, float], out: Path
) -> None:
    """The page and its plots."""
    found = entries(main)
    plot(found, out.with_suffix(".png"))
    plot(entries(unseen), out.with_name(f"{out.stem}-unseen.png"))
    lengths = tuple(dict.fromkeys(e.length for e in found))
    shown = {name: value for name, value in main.settings.items() if name != "samples"}
    both = Results(shown, {}, main.cells | unseen.cells)
    hours = sum(cell.seconds for part in (main, unseen, ablations) for cell in part) / 3600
    lines = [
        markdown(both, "Learned eviction on the demo model"),
        f"![accuracy against budget]({out.stem}.png)",
        f"![tasks the gates never saw]({out.stem}-unseen.png)",
        "",
        "Tasks are described in `mlx_kvret/evaluation/demo_tasks.py`. Gates were trained on texts of 768 "
        f"tokens like those of `facts` with M = 8, the model on at most {TRAINED_LENGTH} tokens. "
        f"`python examples/reproduce.py` writes this page; its cells took {hours:.1f} hours of one thread.",
        "",
        f"On validation seed {VALIDATION_SEED} (`facts`, {lengths[-1]:,} tokens, mean over budgets "
        f"{', '.join(FEW_BUDGETS)}, global): " + ", ".join(f"{k} {v:.3f}" for k, v in valid.items()) + ".",
        "",
        *global_against_head(found, lengths),
        "",
        "## Attention on the right value",
        "",
        "Share that the answering position pays, and the share of right values kept, both in the best head; "
        "budget 1/16.",
        "",
        "| tokens | full | evicted | kept |",
        "|---|---|---|---|",
    ]
    for row in diagnose(run, lengths):
        kept, pair = max(map(max, row["evicted"]["found"])), row["best_head"]
        lines.append(f"| {row['length']:,} | {pair['full']:.3f} | {pair['evicted']:.3f} | {kept:.3f} |")
    lines += ["", "## Ablations", "", "`learned` is global eviction; in brackets how the gates were trained."]
    for task, length in dict.fromkeys((c.task, c.length) for c in ablations):
        lines += ["", f"{task}, {length:,} tokens:", "", table(entries(ablations), task, length)]
    with whole_file(out) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")


def global_against_head(found: list[Entry], lengths: tuple[int, ...]) -> list[str]:
    """The difference, sample by sample, without and with the floor."""
    by_place = {(e.length, e.budget, e.method): e for e in found}
    lines = [
        "## Global eviction minus per head",
        "",
        "Gates trained for each, ± standard error; the first line of a length is without a threshold.",
        "",
        "| tokens | " + " | ".join(BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for length in lengths:
        for ours, theirs in zip(GLOBAL, HEAD, strict=True):
            cells = []
            for budget in BUDGETS:
                one = by_place.get((length, budget, f"{ours} (shared)"))
                other = by_place.get((length, budget, f"{theirs} (per-head)"))
                cells.append("{:+.3f} ± {:.3f}".format(*one.ahead(other)) if one and other else "–")
            lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return lines


def make_model(work: Path) -> Path:
    """Train the demo model from nothing, or take the one that is there."""
    folder = work / "model"
    if not folder.exists():
        import torch
        from package import write_model
        from train_model import train_model

        torch.set_num_threads(2)
        write_model(folder, train_model(0))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shipped-model", action="store_true", help="do not train the model")
    parser.add_argument("--tiny", action="store_true", help="2 seeds, 4 samples, 3 training steps")
    parser.add_argument("--ship", action="store_true", help="replace the gates of the package")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5, help="of shared, separate and per-head gates")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, default=Path("build/reproduce"), help="gates and results files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/retention.md"))
    options = parser.parse_args()
    if options.ship and not options.shipped_model:
        parser.error("--ship needs --shipped-model: gates of another model are of no use in the package")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model = demo.MODEL if options.shipped_model else make_model(options.work)
    run = Run(
        options.work,
        model,
        samples=4 if options.tiny else options.samples,
        seeds=2 if options.tiny else options.seeds,
        few_seeds=1 if options.tiny else 2,
        steps=3 if options.tiny else STEPS,
        batch=100,
        tiny=options.tiny,
    )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        train_all(run, pool)
        chosen = parts(run.tiny)
        by_file = {name: [p for p in chosen if p.file == name] for name in ("main", "unseen", "ablations")}
        fewer = max(2, run.samples // 4)
        first = evaluate(run, by_file["main"], pool, run.samples, SEED)
        unseen = evaluate(run, by_file["unseen"], pool, fewer, SEED)
        ablations = evaluate(run, by_file["ablations"], pool, fewer, SEED, known=first)
        longest = chosen[0].lengths[-1:]
        check = Part("validation", ("facts",), longest, FEW_BUDGETS, GLOBAL[:1], ("shared", "separate"))
        valid = validation(evaluate(run, [check], pool, fewer, VALIDATION_SEED))
    write_page(run, first, unseen, ablations, valid, options.out)
    print(f"wrote {options.out}")
    if options.ship:
        best = next(iter(valid))
        write_gates(demo.GATES, run.gates(best), {"validation_accuracy": valid})
        print(f"wrote {demo.GATES}: {best}")


if __name__ == "__main__":
    main()
