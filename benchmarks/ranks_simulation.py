"""What one selection over several machines exchanges, and how unevenly their memory fills: a simulation.

Scores are recorded from real gates (log β of every head over a text, of the demo and of smollm2), dealt out
anew to the heads of a large model, and its compactions are run one after another as the library runs them.
Nothing is timed: it counts rounds, bytes and entries. Writes benchmarks/results/ranks.md.

python benchmarks/ranks_simulation.py            both recordings, a few CPU minutes
python benchmarks/ranks_simulation.py --quick    the demo's alone, few compactions
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mlx_kvret
from mlx_kvret.core.ranks import Ranks, select
from mlx_kvret.core.snapshot import read_snapshot
from mlx_kvret.texts import read_text

RESULTS = Path(__file__).parent / "results" / "ranks.md"
BUDGET, BUFFER, TOKENS = 128, 16, 1024


@dataclass(frozen=True)
class Shape:
    """A model: what it caches, and what it exchanges for every token in half precision anyway."""

    name: str
    layers: int
    kv_heads: int
    hidden: int

    @property
    def all_reduces(self) -> int:
        """Two in each layer, of the hidden state."""
        return 2 * self.layers


MODELS = (Shape("Qwen3-235B", 94, 4, 4096), Shape("DeepSeek-V3", 61, 1, 7168))
SIZES = (2, 4, 8, 16, 32, 64)


class Counted(Ranks):
    """Sums of all ranks at once, counted as one rank sends them."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _sum(self, counts):
        return counts

    def _gather(self, array):
        return [array]


def recorded(name: str, tokens: int) -> np.ndarray:
    """log β (heads, tokens) of a model's own gates over the demo's story."""
    model, tokenizer = mlx_kvret.load(name)
    ids = tokenizer.encode(read_text("demo"))[:tokens]
    cache = mlx_kvret.make_cache(model, budget=tokens, buffer=1, scope="head", threshold=None)
    mlx_kvret.generate(model, None, ids, cache=cache, max_tokens=1, prefill_step_size=128)
    with tempfile.TemporaryDirectory() as folder:
        mlx_kvret.save_cache(model, cache, Path(folder) / "all.kv")
        found = read_snapshot(Path(folder) / "all.kv")
    return found.retention.reshape(found.counts.size, -1)[:, : len(ids)]


def dealt(log_beta: np.ndarray, heads: int, seed: int) -> np.ndarray:
    """A recorded head for each of the model's, each from another place of the text on."""
    rng = np.random.default_rng(seed)
    shifts = rng.integers(TOKENS, size=heads)
    chosen = log_beta[rng.integers(len(log_beta), size=heads)]
    return np.stack([np.roll(row, shift) for row, shift in zip(chosen, shifts, strict=True)])


def compactions(shape: Shape, log_beta: np.ndarray, seed: int) -> tuple[np.ndarray, float, float]:
    """Entries of each head (compactions, layers, kv_heads), and rounds and bytes of a compaction."""
    heads = shape.layers * shape.kv_heads
    beta = dealt(log_beta, heads, seed)
    head = np.zeros(0, np.int64)
    position = np.zeros(0, np.int64)
    ranks, kept, start = Counted(), [], 0
    while start < TOKENS:
        end = min(TOKENS, start + (BUFFER if kept else BUDGET + BUFFER))
        new = np.arange(start, end)
        head = np.concatenate([head, np.repeat(np.arange(heads), len(new))])
        position = np.concatenate([position, np.tile(new, heads)])
        start = end
        if len(head) < (BUDGET + BUFFER) * heads:
            break
        score = ((end + 1 - position) * beta[head, position]).astype(np.float32)[None]
        must = np.zeros(score.shape, bool)
        stays = select(score, must, position[None], head[None], BUDGET * heads, end, heads, ranks)[0]
        head, position = head[stays], position[stays]
        kept.append(np.bincount(head, minlength=heads).reshape(shape.layers, shape.kv_heads))
    return np.array(kept), ranks.rounds / len(kept), ranks.nbytes / len(kept)


def shares(kept: np.ndarray, split: str, size: int) -> np.ndarray | None:
    """Entries of each rank over the mean (compactions, size); None where the model does not divide so."""
    count, layers, heads = kept.shape
    if split == "heads":
        if heads % size:
            return None
        parts = kept.sum(1).reshape(count, size, -1).sum(2)
        mean = np.full(size, 1 / size)
    else:
        if layers < size:
            return None
        ends = np.cumsum([layers // size + (rank < layers % size) for rank in range(size)])[:-1]
        groups = np.split(kept.sum(2), ends, axis=1)
        parts = np.stack([group.sum(1) for group in groups], 1)
        mean = np.array([group.shape[1] for group in groups]) / layers
    return parts / parts.sum(1, keepdims=True) / mean


def tables(recordings: dict[str, np.ndarray], seeds: int) -> tuple[str, str]:
    """What is exchanged, and how uneven shares are, as tables in Markdown."""
    lines = [
        "| model | scores of | split by | ranks | fullest rank over its mean, worst | usual | emptiest |",
        "|---|---|---|---|---|---|---|",
    ]
    costs = [
        "| model | scores of | rounds per compaction | KB per compaction | KB per token | all-reduces per "
        "token anyway | KB per token anyway |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in MODELS:
        for name, log_beta in recordings.items():
            runs = [compactions(shape, log_beta, seed) for seed in range(seeds)]
            kept = np.concatenate([run[0] for run in runs])
            rounds, size = np.mean([run[1] for run in runs]), np.mean([run[2] for run in runs]) / 1e3
            anyway = shape.all_reduces * shape.hidden * 2 / 1e3
            costs.append(
                f"| {shape.name} | {name} | {rounds:.1f} | {size:.1f} | {size / BUFFER:.2f} | "
                f"{shape.all_reduces} | {anyway:,.0f} |"
            )
            for split in ("heads", "layers"):
                for ranks in SIZES:
                    if (found := shares(kept, split, ranks)) is not None:
                        worst, usual, least = found.max(), np.median(found.max(1)), found.min()
                        lines.append(
                            f"| {shape.name} | {name} | {split} | {ranks} | {worst:.2f} | {usual:.2f} | "
                            f"{least:.2f} |"
                        )
    return "\n".join(costs), "\n".join(lines)


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    names = ("demo",) if quick else ("demo", "smollm2")
    recordings = {name: recorded(name, TOKENS) for name in names}
    costs, lines = tables(recordings, 1 if quick else 3)
    heads = ", ".join(f"{name} ({len(found)} heads)" for name, found in recordings.items())
    text = f"""# One selection over several machines: what it exchanges, and how unevenly memory fills

By `python benchmarks/ranks_simulation.py`. log β of every head of {heads} over {TOKENS}
tokens of the demo's story; each head of a large model gets one of them at random, from a place of its own
on. Budget {BUDGET}, buffer {BUFFER}, scope global, 3 deals. Nothing is timed. A deal at random does not say
how a large model's own gates differ from layer to layer: real shares may be more uneven.

## Exchange

What one rank sends in a compaction, once per buffer ({BUFFER} tokens here; an eighth of the budget unless
given), against the all-reduces that splitting by heads costs for every token anyway (two in a layer, of the
hidden state in half precision). The counts do not grow with the budget or with the number of ranks.
DeepSeek-V3 split by heads has a copy on every rank and exchanges one bit for each candidate instead.

{costs}

## Imbalance

Entries of a rank over what an even split would give it: 1 is even. The scopes `layer` (split by layers) and
`head` are even by definition.

{lines}
"""
    if quick:
        print(text)
    else:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
