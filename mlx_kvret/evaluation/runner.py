"""Runs a grid of tasks, lengths, budgets and methods; what a results file holds already is not run again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tqdm import tqdm

from ..errors import ConfigError
from .engine import Engine, Outcome
from .methods import Method, budget_tokens, parse_fraction
from .results import Cell, Results, cell_key
from .samples import Sample
from .tasks import check_task, has_length, make_samples, metric

FULL = "all"


@dataclass(frozen=True)
class Grid:
    """What is compared. ``budgets`` are tokens per head (``"64"``) or shares of the text (``"1/16"``)."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[str, ...]
    methods: tuple[Method, ...]
    samples: int = 50
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        for task in self.tasks:
            check_task(task)
        for budget in self.budgets:
            parse_fraction(budget)
        for name in ("tasks", "lengths", "budgets", "methods"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} were given; give at least one")
        if self.samples < 1 or min(self.lengths) < 1 or self.seed < 0:
            raise ConfigError(
                f"samples is {self.samples}, seed {self.seed}, lengths {self.lengths}; "
                "expected at least 1 sample, a seed from 0 up and lengths of at least 1"
            )

    def cells(self, gates: Sequence[str]) -> Iterator[tuple[str, int, str, Method, str]]:
        """(gates, task, length) vary slowest; only learned methods are run with each of the gates."""
        for task in dict.fromkeys(self.tasks):
            for length in dict.fromkeys(self.lengths) if has_length(task) else (0,):
                for label in ["", *gates]:
                    for method in self.methods:
                        if method.learned == bool(label):
                            for budget in (FULL,) if method.full else dict.fromkeys(self.budgets):
                                yield task, length, budget, method, label


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
        ConfigError: learned methods without gates, or a method that no engine runs.
    """
    if any(method.learned for method in grid.methods) and not gates:
        raise ConfigError("learned methods were asked for without gates; give some, or choose other methods")
    chosen = {method: _engine_for(method, engines) for method in grid.methods}
    wanted = list(grid.cells(list(gates)))
    missing = [cell for cell in wanted if cell_key(*cell[:3], cell[3].name, cell[4]) not in results.cells]
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), disable=not progress, unit="cell")
    with bar:
        for (task, length), cells in groupby(missing, lambda cell: cell[:2]):
            samples = make_samples(task, length, grid.samples, grid.seed, tokenizer, grid.chat)
            for _, _, budget, method, label in cells:
                bar.set_postfix_str(f"{task} {length or ''} {method.name} {budget} {label}")
                engine = chosen[method]
                if label:
                    engine.use_gates(gates[label])
                start = time.perf_counter()
                outcomes = _run(engine, samples, method, budget, length)
                if bad := [i for i, outcome in enumerate(outcomes) if not math.isfinite(outcome.score)]:
                    raise ConfigError(f"{task}: sample {bad[0]} has no finite score; the model gives NaN?")
                results.add(
                    Cell(
                        *(task, length, budget, method.name, label, engine.name, metric(task)),
                        tuple(outcome.score for outcome in outcomes),
                        sum(outcome.entries for outcome in outcomes) / len(outcomes),
                        round(time.perf_counter() - start, 2),
                    )
                )
                bar.update()
    return results


def _engine_for(method: Method, engines: Sequence[Engine]) -> Engine:
    for engine in engines:
        if engine.runs(method):
            return engine
    raise ConfigError(
        f"method {method.name} looks at attention or at the answers, which only the reference backend shows; "
        "add backend reference (needs torch), or drop the method"
    )


def _run(
    engine: Engine, samples: Sequence[Sample], method: Method, budget: str, length: int
) -> list[Outcome]:
    if method.full or length:
        return engine.run(samples, method, 1 if method.full else budget_tokens(budget, length))
    # a share of a text whose length is its own
    return [engine.run([sample], method, budget_tokens(budget, sample.tokens))[0] for sample in samples]
