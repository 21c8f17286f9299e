"""What the host does for each token while a GPU repeats recorded steps: the repetition itself is stubbed.

    python benchmarks/host_work.py [--layers 36] [--rows 1 8 16] [--idle 0 7 31] [--write]

A random Qwen3 of many narrow layers decodes on the CPU with everything that a GPU would have but the GPU:
fixed memory, clocks, compactions, the token read back, and the figures that each response carries. At the
median token nothing is due. The mean counts gates and compactions too, whose arithmetic the CPU does here
itself, on narrow layers, while a GPU is only told to. Times are those of the thread, so that others' work on
the machine counts less.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.cuda_backend.gates import RetentionGates
from mlx_kvret.cuda_backend.recording import Called
from mlx_kvret.cuda_backend.step import FixedStep
from mlx_kvret.cuda_backend.tokens import Told

RESULTS = Path(__file__).parent / "results" / "host_work.md"


class Stub(Called):
    """A recorded step whose repetition costs the host nothing."""

    def repeat(self, work: Any) -> None:
        """What a GPU would be told in one call."""


def build(layers: int) -> tuple[Any, hooks.Attachment]:
    """A random model of the depth of real ones, and nothing else of them."""
    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=16, intermediate_size=16, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, max_position_embeddings=65536,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    gates = RetentionGates(GateConfig("rg10", layers, 2, 16, 16)).requires_grad_(False)
    return model, hooks.install(model, gates, {"model": "", "gates": ""})


@torch.no_grad()
def filled(model: Any, made: hooks.Attachment, rows: int, config: EvictionConfig) -> BoundedCache:
    """A cache whose rows have read more than their budget."""
    cache = hooks.new_cache(model, made, config)
    for part in torch.randint(0, 64, (rows, 3 * config.budget)).split(config.budget, 1):
        model(part, **cache_argument(model, cache), logits_to_keep=1)
    return cache


@torch.no_grad()
def measure(model: Any, cache: BoundedCache, tokens: int) -> dict[str, list[float]]:
    """Seconds per token: of the step, of the token that is read back, and of a response's figures."""
    step, told = FixedStep(model, cache, Stub), Told(torch.device("cpu"))
    token = torch.zeros(cache.rows, 1, dtype=torch.long)
    step(token, torch.clone)
    times: dict[str, list[float]] = {"step": [], "token": [], "figures": []}
    clock = time.thread_time
    for _ in range(tokens):
        begin = clock()
        turn = told.ask(token[:, 0])
        asked = clock()
        step(token, _same)
        stepped = clock()
        told.get(turn, len(token))
        read = clock()
        _ = cache.seen, cache.entries, cache.nbytes
        end = clock()
        times["step"].append(stepped - asked)
        times["token"].append(asked - begin + read - stepped)
        times["figures"].append(end - read)
    assert step.captures == 1 and not step.failed
    return times


def _same(logits: torch.Tensor) -> torch.Tensor:
    return logits


def row_of(name: str, model: Any, cache: BoundedCache, tokens: int) -> str:
    times = measure(model, cache, tokens)
    every = [sum(own) for own in zip(*times.values(), strict=True)]
    cells = [*map(statistics.median, (*times.values(), every)), statistics.fmean(every)]
    return f"| {name} | {' | '.join(f'{cell * 1e3:.3f}' for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=36, help="of the model (36)")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16], help="batch sizes (1 8 16)")
    parser.add_argument("--idle", nargs="+", type=int, default=[0, 7, 31], help="idle slabs (0 7 31)")
    parser.add_argument("--tokens", type=int, default=400, help="steps that are measured (400)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results")
    options = parser.parse_args()
    model, made = build(options.layers)
    config = EvictionConfig.create(64, 32)
    head = ["step", "token read back", "figures", "together", "mean, with what is due"]
    lines = [
        "# The host's work per token",
        "",
        f"`python benchmarks/host_work.py --write`, {datetime.date.today()}, CPU ({platform.machine()}, "
        f"{torch.get_num_threads()} threads), torch {torch.__version__}, {options.layers} layers, repetition "
        f"of the recorded step stubbed, medians of {options.tokens} tokens, ms of the thread.",
    ]

    def table(title: str, first: str) -> None:
        columns = f"| {first} | {' | '.join(head)} |"
        lines.extend(["", f"## {title}", "", columns, "|--" * (len(head) + 1) + "|"])

    table("Rows", "rows")
    for rows in options.rows:
        lines.append(row_of(str(rows), model, filled(model, made, rows, config), options.tokens))
    table("One row beside slabs that somebody holds and nobody reads", "idle slabs")
    for count in options.idle:
        cache = filled(model, made, 1, config)
        kept = []
        for _ in range(count):
            kept.append(cache.copy())
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long), **cache_argument(model, cache))
        lines.append(row_of(str(count), model, cache, options.tokens))
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
