"""Runs a grid of tasks, lengths, budgets and methods; what a results file holds already is not run again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.options import MAX_SEED, whole
from ..errors import ConfigError
from .engine import Engine
from .methods import Method, budget_tokens, parse_fraction
from .progress import Progress
from .results import Cell, Results, cell_key
from .samples import Sample
from .tasks import check_task, has_length, make_samples, metric

FULL = "all"


@dataclass(frozen=True)
class Grid:
    """What is compared. ``budgets`` are tokens per head (``"64"``) or shares of the text (``"1/16"``).

    ``data`` are the text files of the task ``text``.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[str, ...]
    methods: tuple[Method, ...]
    samples: int = 50
    seed: int = 0
    chat: bool = False
    data: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for task in self.tasks:
            check_task(task, self.data)
        if self.data and "text" not in self.tasks:
            raise ConfigError("text files were given, which only task text reads; add it or drop them")
        for budget in self.budgets:
            parse_fraction(budget)
        for name in ("tasks", "lengths", "budgets", "methods"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} were given; give at least one")
        whole("samples", self.samples, 1)
        whole("seed", self.seed, 0, MAX_SEED)
        for length in self.lengths:
            whole("length", length, 1)

    def cells(self, gates: Sequence[str]) -> Iterator[Job]:
        """Everything to be run, task by task, length by length, budget by budget."""
        for task in dict.fromkeys(self.tasks):
            for length in dict.fromkeys(self.lengths) if has_length(task) else (0,):
                yield from jobs(task, length, self.budgets, self.methods, gates)


class Job(NamedTuple):
    """A cell to be run; ``gates`` is "" where none are used, ``budget`` :data:`FULL` for the full cache."""

    task: str
    length: int
    budget: str
    method: Method
    gates: str

    @property
    def key(self) -> str:
        return cell_key(self.task, self.length, self.budget, self.method.name, self.gates)

    @property
    def place(self) -> str:
        """For a message."""
        text = f"{self.length} tokens" if self.length else "texts as they are"
        return f"{self.task}, {text}, budget {self.budget}"


def jobs(
    task: str, length: int, budgets: Sequence[str], methods: Sequence[Method], gates: Sequence[str]
) -> Iterator[Job]:
    """The cells of one task and length; only learned methods are run with each of the gates.

    Methods of a budget come one after another, so that an engine can share what they have in common.
    """
    if any(method.learned for method in methods) and not gates:
        raise ConfigError("learned methods were asked for without gates; give some, or choose other methods")
    for budget in (FULL, *dict.fromkeys(budgets)):
        for label in ("", *gates):
            for method in methods:
                if method.learned == bool(label) and method.full == (budget == FULL):
                    yield Job(task, length, budget, method, label)


def run_grid(
    grid: Grid,
    engines: Sequence[Engine],
    gates: Mapping[str, Any],
    results: Results,
    tokenizer: Any = None,
    progress: bool = True,
) -> Results:
    """Run what is missing; every finished cell is in the file at once.

    Args:
        engines: each cell goes to the first that can run its method.
        gates: gate checkpoints by label; learned methods are run with each of them.

    Raises:
        ConfigError: learned methods without gates, a method that no engine runs, or a cell in which nothing
            would be evicted before the last thing is scored. Nothing has been run then.
        ModelMismatchError: gates of another model.
    """
    wanted = list(grid.cells(list(gates)))
    places = dict.fromkeys((job.task, job.length) for job in wanted)
    samples = {
        (task, length): make_samples(task, length, grid.samples, grid.seed, tokenizer, grid.chat, grid.data)
        for task, length in places
    }
    return run_cells(wanted, samples, engines, gates, results, progress)


def run_cells(
    wanted: Sequence[Job],
    samples: Mapping[tuple[str, int], Sequence[Sample]],
    engines: Sequence[Engine],
    gates: Mapping[str, Any],
    results: Results,
    progress: bool = True,
) -> Results:
    """As :func:`run_grid` for samples by task and length."""
    chosen = {job.method: _engine_for(job.method, engines) for job in wanted}
    missing = [job for job in wanted if job.key not in results.cells]
    _check_evictions(missing, samples, chosen)
    for engine in {id(e): e for e in chosen.values()}.values():
        # gates of another model are told now, not after hours
        for label in gates if any(job.gates for job in missing) else ():
            engine.use_gates(gates[label])
    with Progress(len(wanted), len(wanted) - len(missing), progress) as told:
        for job in missing:
            told.starts(f"{job.place} {job.method.name} {job.gates}".rstrip())
            engine, own = chosen[job.method], samples[job.task, job.length]
            if job.gates:
                engine.use_gates(gates[job.gates])
            results.add(_run(engine, own, job, gates.get(job.gates)))
            told.done()
    return results


def _engine_for(method: Method, engines: Sequence[Engine]) -> Engine:
    for engine in engines:
        if engine.runs(method):
            return engine
    raise ConfigError(
        f"method {method.name} looks at attention or at the answers, which only the reference backend shows; "
        "add backend reference (needs torch), or drop the method"
    )


def _check_evictions(
    missing: Sequence[Job],
    samples: Mapping[tuple[str, int], Sequence[Sample]],
    engines: Mapping[Method, Engine],
) -> None:
    """Refuse cells whose every policy would look like the full cache."""
    told = {}
    for job in missing:
        pace, own = engines[job.method].pace, samples[job.task, job.length]
        if not job.method.full and not any(pace.touched(sample, _tokens(job, sample)) for sample in own):
            most = max(_tokens(job, sample) for sample in own)
            told[job.place] = (
                f"{job.place}: the cache may grow to {most + pace.buffer(most)} tokens per head before "
                f"entries go, texts have {max(sample.tokens for sample in own)} at most and are read "
                f"{pace.chunk(most)} at a time"
            )
    if told:
        raise ConfigError(
            "nothing would be evicted before the last token is scored, so that every policy would look like "
            f"the full cache: {'; '.join(told.values())}. Lower the budget, the chunk or the buffer, or take "
            "longer texts"
        )


def _tokens(job: Job, sample: Sample) -> int:
    # a benchmark's texts have lengths of their own
    return budget_tokens(job.budget, job.length or sample.tokens)


def _run(engine: Engine, samples: Sequence[Sample], job: Job, gates: Any) -> Cell:
    start, method = time.perf_counter(), job.method
    budgets = [1 if method.full else _tokens(job, sample) for sample in samples]
    if len(set(budgets)) == 1:
        outcomes = engine.run(samples, method, budgets[0])
    else:
        outcomes = [engine.run([sample], method, m)[0] for sample, m in zip(samples, budgets, strict=True)]
    if bad := [i for i, outcome in enumerate(outcomes) if not math.isfinite(outcome.score)]:
        raise ConfigError(f"{job.task}: sample {bad[0]} has no finite score; the model gives NaN?")
    pairs = zip(samples, budgets, strict=True)
    untouched = 0 if method.full else sum(not engine.pace.touched(s, m) for s, m in pairs)
    config = getattr(gates, "config", None)
    return Cell(
        *(job.task, job.length, job.budget, method.name, job.gates, engine.name, metric(job.task)),
        tuple(outcome.score for outcome in outcomes),
        sum(outcome.entries for outcome in outcomes) / len(outcomes),
        round(time.perf_counter() - start, 2),
        engine.pace.chunk(None if method.full else max(budgets)),
        untouched,
        "" if config is None else method.unlike(config, min(budgets)),
    )
