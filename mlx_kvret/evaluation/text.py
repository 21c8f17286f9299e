"""Negative log-likelihood of plain text under any number of policies and budgets, for scripts.

>>> from mlx_kvret.evaluation import entries, evaluate_text, gains, open_bench, parse_methods, text_pieces
>>> methods = parse_methods(["full", "learned", "h2o", "recent"])
>>> bench = open_bench("path/to/model", methods, ["path/to/gates"], "reference", batch=8, dtype="bfloat16")
>>> pieces = text_pieces(["novel.txt"], bench.tokenizer, length=1024, count=16)
>>> rows = evaluate_text(bench.engines, pieces, methods, ["1/4", "1/16"], bench.gates, path="novel.json")
>>> rows[0].method, rows[0].budget, rows[0].scores  # nats per token of every piece, in order
>>> for gain in gains(entries(rows), "full"):       # paired over pieces (and seeds of gates)
...     print(gain.method, gain.budget, -gain.mean, gain.error)  # nats above the full cache
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.checkpoint import GateCheckpoint
from ..core.tensors import tensors_id
from ..errors import ConfigError
from .engine import Engine
from .methods import Method, level, parse_fraction, parse_methods
from .results import Cell, open_results
from .runner import jobs, run_cells
from .samples import Sample, Turn
from .tasks import TEXT, make_samples


def text_pieces(
    files: Iterable[str | Path], tokenizer: Any, length: int, count: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Up to ``count`` consecutive, non-overlapping pieces of ``length`` tokens, from the files in turn.

    Raises:
        ConfigError: a file that is not there, or shorter than one piece.
    """
    samples = make_samples(TEXT, length, count, seed, tokenizer, data=tuple(map(Path, files)))
    return [sample.turns[0].ids for sample in samples]


def evaluate_text(
    engines: Engine | Sequence[Engine],
    pieces: Sequence[Sequence[int]],
    methods: Iterable[str | Method],
    budgets: Sequence[int | str],
    gates: Mapping[str, GateCheckpoint] | None = None,
    *,
    path: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[Cell]:
    """Score every token of every piece but the first from what each method has kept until then.

    A piece is read in chunks (of the engine's ``chunk``: half the budget unless given) into a cache of its
    own; a chunk attends to what is kept and to itself, then eviction runs. The full cache is run once,
    without a budget. Methods without gates protect as many sinks as the learned ones (:func:`.level`).

    Args:
        engines: one, or several of which each method takes the first that can run it.
            :class:`~mlx_kvret.evaluation.reference.ReferenceEngine` runs every method, ``batch`` pieces at a
            time; :class:`~mlx_kvret.evaluation.engine.PublicEngine` those that the library's caches offer.
        pieces: token ids, all of one length.
        methods: names as of ``mlx-kvret eval --method``: ``full``, ``learned``, ``learned-layer``,
            ``learned-head``, ``h2o``, ``snapkv``, ``keydiff``, ``knorm``, ``recent``, ``random``, each with
            options: ``learned:sinks=4``.
        budgets: tokens per KV head (64), or shares of a piece (``"1/16"``).
        gates: checkpoints by label; labels ``a/0``, ``a/1`` are seeds of one training.
        path: a results file, written after every cell; what it holds already is not run again.
        settings: what else must be the same for all runs of the file, such as ``bench.settings``.

    Returns:
        One :class:`~mlx_kvret.evaluation.results.Cell` for each (budget, gates, method): ``scores`` are nats
        per token of each piece, in the order of ``pieces``, so that differences can be paired.

    Raises:
        ConfigError: pieces of unequal length, a budget at which nothing is evicted, a file of other pieces.
        ModelMismatchError: gates of another model.
    """
    gates, engines = gates or {}, [engines] if not isinstance(engines, Sequence) else engines
    lengths = {len(piece) for piece in pieces}
    if len(lengths) != 1 or min(lengths) < 2:
        told = ", ".join(map(str, sorted(lengths))) or "no"
        raise ConfigError(f"pieces have {told} tokens; expected one length of at least 2")
    labels = [str(budget) for budget in budgets]
    for label in labels:
        parse_fraction(label)
    chosen = [method if isinstance(method, Method) else parse_methods([method])[0] for method in methods]
    chosen = list(level(chosen, [checkpoint.config for checkpoint in gates.values()]))
    (length,) = lengths
    samples = [Sample((Turn(tuple(map(int, piece)), scored=True),)) for piece in pieces]
    fixed = dict(settings or {}) | {
        "task": TEXT,
        "length": length,
        "pieces": _digest(samples),
        "read": [list(engine.pace.given) for engine in engines],
        "sinks": max((method.least_sinks for method in chosen), default=0),
    }
    digests = {label: tensors_id(found.tensors) for label, found in gates.items()}
    results = open_results(path, fixed, digests)
    wanted = list(jobs(TEXT, length, labels, chosen, list(gates)))
    run_cells(wanted, {(TEXT, length): samples}, engines, gates, results, progress)
    return [results.cells[job.key] for job in wanted]


def _digest(samples: Sequence[Sample]) -> str:
    ids = ",".join(str(token) for sample in samples for token in sample.turns[0].ids)
    return hashlib.sha256(f"{len(samples)}:{ids}".encode()).hexdigest()[:16]
