"""Cells of a results file, one for each thing that is measured; what is there already is not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_kvret.core.tensors import tensors_id
from mlx_kvret.evaluation import Cell, Method, Results, open_results
from mlx_kvret.evaluation.runner import FULL, Job, jobs

# figures of which fewer are better; all others are shares
NATS = "nats"
# what a measurement is: for each thing its name and a score for each sample
Found = Mapping[str, Sequence[float]]


class Part:
    """The cells of one ability.

    Args:
        path: the results file.
        settings: what must be the same for all runs of it.
        gates: checkpoints by label.
    """

    def __init__(self, path: Path, settings: dict[str, Any], gates: Mapping[str, Any]) -> None:
        self.gates = gates
        digests = {label: tensors_id(found.tensors) for label, found in gates.items()}
        self.results: Results = open_results(path, settings, digests)

    def fill(
        self,
        task: str,
        length: int,
        budgets: Sequence[str],
        methods: Sequence[Method],
        names: Iterable[str],
        engine: Any,
        measure: Callable[[Method, str], Found],
    ) -> None:
        """Run every method at every budget; ``measure(method, budget)`` finds all of ``names`` at once."""
        names, labels = list(names), list(self.gates) if any(m.learned for m in methods) else []
        for job in jobs(task, length, budgets, methods, labels):
            wanted = {name: job._replace(task=f"{task}: {name}") for name in names}
            if all(one.key in self.results.cells for one in wanted.values()):
                continue
            if job.gates:
                engine.use_gates(self.gates[job.gates])
            start = time.perf_counter()
            found = measure(job.method, job.budget)
            seconds = round(time.perf_counter() - start, 1)
            for name, one in wanted.items():
                self._add(one, engine.name, name, found[name], seconds)
            self.results.save()
            shown = ", ".join(f"{name} {sum(found[name]) / len(found[name]):.3f}" for name in names)
            print(f"{job.place} {job.method.name} {job.gates}: {shown} ({seconds:.0f} s)", flush=True)

    def _add(self, job: Job, engine: str, name: str, scores: Sequence[float], seconds: float) -> None:
        self.results.cells[job.key] = Cell(
            *(job.task, job.length, job.budget, job.method.name, job.gates, engine),
            "nll" if NATS in name else "share",
            tuple(float(score) for score in scores),
            entries=0.0,
            seconds=seconds,
        )

    def mean(self, task: str, length: int, method: str = "full") -> float:
        """The full cache's mean of one thing."""
        (cell,) = (
            cell
            for cell in self.results
            if (cell.task, cell.length, cell.method, cell.budget) == (task, length, method, FULL)
        )
        return sum(cell.scores) / len(cell.scores)
