"""Why eviction helps or hurts: where attention goes, and where the kept entries are.

*Dilution*: the share of a softmax that useful entries get falls as useless ones are added, and comes back
when those are evicted. Measured is the attention that the last token of a question pays to the
positions that hold its answer, per layer and query head, with the full cache and after eviction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.files import whole_file
from ..core.types import Floats
from ..errors import ConfigError
from .bench import Bench
from .engine import PublicEngine
from .methods import Method, budget_tokens, parse_method
from .runner import Grid
from .samples import Question, Sample, batches
from .tasks import has_length, make_samples, metric

BINS = 16


@dataclass(frozen=True)
class Diagnosis:
    """``mass`` (L, Hq): mean attention on useful entries; ``found`` (L, H): share of them that is kept;
    ``held`` (L, H): entries per token of the text; ``by_position`` (L, H, bins): by sixteenths of it.
    """

    mass: Floats
    found: Floats
    held: Floats
    by_position: Floats

    def to_dict(self) -> dict[str, Any]:
        return {name: np.round(value, 5).tolist() for name, value in vars(self).items()}


def diagnose(engine: Any, samples: Sequence[Sample], method: Method, budget: int) -> Diagnosis:
    """Read one-turn samples with a :class:`~mlx_kvret.evaluation.reference.ReferenceEngine` and look.

    Raises:
        ConfigError: the task does not say which positions are useful, or has several turns.
    """
    if any(len(s.turns) != 1 or not all(q.useful for q in s.turns[0].questions) for s in samples):
        raise ConfigError("the diagnosis needs one-turn tasks that know the useful positions; choose another")
    mass, found, held = [], [], []
    for places in batches(samples, engine.batch):
        here = [samples[i] for i in places]
        reading = engine.open(here, method, budget)
        reading.read([sample.turns[0] for sample in here])
        held += [_histogram([_kept(e, row) for e in reading.layers], s.tokens) for row, s in enumerate(here)]
        watch = _Watch([sample.turns[0].questions for sample in here])
        reading.look = watch
        reading.follow([[q.ids for q in questions] for questions in watch.asked])
        mass.append(np.stack(watch.mass))
        found.append(np.stack(watch.found))
    shares = np.mean(held, 0)
    return Diagnosis(np.mean(mass, 0), np.mean(found, 0), shares.mean(-1), shares)


def check_diagnosis(grid: Grid) -> None:
    """Refuse tasks that do not say which positions are useful, before anything is run.

    Raises:
        ConfigError: names them.
    """
    if wrong := [
        task for task in grid.tasks if metric(task) == "nll" or not has_length(task) or "turn" in task
    ]:
        raise ConfigError(
            f"the diagnosis needs one-turn tasks that know the useful positions, which {', '.join(wrong)} "
            "does not; choose another task, or drop --diagnose"
        )


class _Watch:
    """Collects from each layer the attention paid to useful entries by the last token of each question."""

    def __init__(self, asked: list[tuple[Question, ...]]) -> None:
        self.asked = asked
        self._longest = max(len(question.ids) for questions in asked for question in questions)
        self.mass: list[Floats] = []
        self.found: list[Floats] = []

    def __call__(self, layer: int, weights: Any, entries: Any) -> None:
        import torch

        paid, kept = [], []
        for row, questions in enumerate(self.asked):
            for i, question in enumerate(questions):
                useful = torch.tensor(question.useful, device=weights.device)
                right = torch.isin(entries.position[row], useful) & entries.valid[row]
                last = i * self._longest + len(question.ids) - 1
                paid.append((weights[row, :, :, last] * right[:, None]).sum(-1).flatten().cpu().numpy())
                kept.append((right.sum(-1) / len(useful)).cpu().numpy())
        self.mass.append(np.mean(paid, 0))
        self.found.append(np.mean(kept, 0))


def retained(engine: PublicEngine, samples: Sequence[Sample], method: Method, budget: int) -> Floats:
    """Entries per token of the text by layer, head and sixteenth of it, (L, H, bins), on either backend."""
    shares = []
    for sample in samples:
        cache = engine.new_cache(method, budget)
        ids = [token for turn in sample.turns for token in turn.ids]
        engine.read(ids, cache, engine.pace.chunk(None if method.full else budget))
        shares.append(_histogram(cache.kept_positions(), len(ids)))
    return np.asarray(np.mean(shares, 0))


def dilution(engine: Any, samples: Sequence[Sample], method: Method, budget: int) -> dict[str, Any]:
    """Full against evicted, as JSON data, with the head that pays most in each case."""
    full = diagnose(engine, samples, parse_method("full"), 1)
    cut = diagnose(engine, samples, method, budget)
    return {
        "method": method.name,
        "budget": budget,
        "best_head": {"full": float(full.mass.max()), "evicted": float(cut.mass.max())},
        "full": full.to_dict(),
        "evicted": cut.to_dict(),
    }


def _kept(entries: Any, row: int) -> list[Floats]:
    return [
        position[valid].cpu().numpy()
        for position, valid in zip(entries.position[row], entries.valid[row], strict=True)
    ]


def _histogram(kept: Sequence[Sequence[Any]], tokens: int) -> Floats:
    edges = np.linspace(0, tokens, BINS + 1)
    sizes = np.histogram(np.arange(tokens), edges)[0]
    return np.array([[np.histogram(p, edges)[0] / sizes for p in layer] for layer in kept])


def write_diagnosis(bench: Bench, grid: Grid, path: str | Path) -> None:
    """The dilution of every evicting method of a grid at every task, length and budget, as a JSON file."""
    rows = []
    for task, length, budget, method, label in grid.cells(list(bench.gates)):
        if method.full:
            continue
        if label:
            bench.reference.use_gates(bench.gates[label])
        samples = make_samples(task, length, grid.samples, grid.seed, bench.tokenizer, grid.chat)
        found = dilution(bench.reference, samples, method, budget_tokens(budget, length))
        rows.append({"task": task, "length": length, "gates": label, **found})
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(rows) + "\n", encoding="utf-8")
