"""Rows of a batch on the torch backend: time per step and per token, and the host's part of it.

    python benchmarks/cuda_batch.py [--rows 1 8 16] [--turns 5] [--write]

A random Qwen3 decodes R rows of clocks of their own, each within a budget of M, against transformers' dense
cache of the same batch that begins each turn with M tokens per head. The host's part is the time of a step on
a model so small that nothing else is left. Times are the CPU's own, so that others' work on the machine
counts less; caches take turns, numbers are medians.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.cuda_backend.gates import RetentionGates

RESULTS = Path(__file__).parent / "results" / "cuda_batch.md"
SIZES: dict[str, dict[str, int]] = {
    "host": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2000},
}  # fmt: skip


def build(size: str) -> tuple[Any, hooks.Attachment]:
    """A random model with random gates whose log β spreads from head to head."""
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES[size], max_position_embeddings=8192)
    model: Any = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    shape = GateConfig("rg10", config.num_hidden_layers, config.num_key_value_heads, config.hidden_size, 64)
    gates = RetentionGates(shape).requires_grad_(False)
    gates.shared.bias.data = torch.linspace(4.0, 8.0, config.num_key_value_heads)
    return model, hooks.install(model, gates, {"model": "", "gates": ""})


@torch.no_grad()
def bounded(model: Any, made: hooks.Attachment, rows: int, config: EvictionConfig) -> BoundedCache:
    """Rows that have read more than their budget, each a little more than the one before."""
    together: BoundedCache | None = None
    for row in range(rows):
        cache = hooks.new_cache(model, made, config)
        for part in torch.randint(0, 64, (1, 2 * config.budget + 3 * row)).split(config.budget, 1):
            model(part, **cache_argument(model, cache), logits_to_keep=1)
        if together is None:
            together = cache
        else:
            together.extend(cache)
    assert together is not None
    together.settle()
    return together


@torch.no_grad()
def turn(model: Any, cache: Any, rows: int, tokens: int) -> float:
    """Seconds of the CPU per step."""
    token = torch.zeros(rows, 1, dtype=torch.long)
    start = time.process_time()
    for _ in range(tokens):
        logits = model(token, **cache_argument(model, cache), logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return (time.process_time() - start) / tokens


def table(size: str, counts: list[int], config: EvictionConfig, turns: int, tokens: int) -> list[str]:
    """Steps of batches of several sizes."""
    model, made = build(size)
    lines = [
        "| rows | bounded ms/step | dense ms/step | ratio | bounded ms/token | MB | of single ones |",
        "|--|--|--|--|--|--|--|",
    ]
    for rows in counts:
        cache = bounded(model, made, rows, config)
        single = bounded(model, made, 1, config)
        turn(model, single, 1, 1)
        turn(model, cache, rows, 1)
        assert cache.shared is not None
        held, alone = cache.shared.arena.nbytes, single.nbytes
        times: dict[str, list[float]] = {"bounded": [], "dense": []}
        for _ in range(turns + 1):
            times["bounded"].append(turn(model, cache, rows, tokens))
            # as many entries as the bounded rows hold, each turn anew
            dense = DynamicCache(config=model.config)
            with torch.no_grad():
                model(torch.randint(0, 64, (rows, config.budget)), **cache_argument(model, dense))
            times["dense"].append(turn(model, dense, rows, tokens))
        # the first turn warms up
        ours, theirs = (statistics.median(times[name][1:]) * 1e3 for name in ("bounded", "dense"))
        lines.append(
            f"| {rows} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {ours / rows:.2f} | "
            f"{held / 1e6:.1f} | {held / (rows * alone):.2f} |"
        )
    return lines


def idle(model: Any, made: hooks.Attachment, config: EvictionConfig, tokens: int) -> list[str]:
    """A row's step beside slabs that somebody holds and nobody reads."""
    cache = bounded(model, made, 1, config)
    lines = ["| idle slabs | ms a step |", "|--|--|"]
    kept: list[BoundedCache] = []
    for count in (0, 7, 31):
        while len(kept) < count:
            kept.append(cache.copy())
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long), **cache_argument(model, cache))
        spent = statistics.median(turn(model, cache, 1, tokens) for _ in range(3))
        lines.append(f"| {count} | {spent * 1e3:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16], help="batch sizes (1 8 16)")
    parser.add_argument("--budget", type=int, default=256, help="M, tokens per KV head (256)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each cache (3)")
    parser.add_argument("--tokens", type=int, default=16, help="steps in a turn (16)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results")
    options = parser.parse_args()
    config = EvictionConfig.create(options.budget)
    given: list[Callable[[], list[str]]] = [
        lambda: table("small", options.rows, config, options.turns, options.tokens),
        lambda: table("host", options.rows, EvictionConfig.create(32), options.turns, options.tokens),
        lambda: idle(*build("host"), EvictionConfig.create(32), options.tokens),
    ]
    titles = (
        f"## Whole steps, {options.budget} tokens per head",
        "## The host's part: a model of width 16",
        "## One row beside idle slabs",
    )
    lines = [
        "# Rows of a batch on torch",
        "",
        f"`python benchmarks/cuda_batch.py --write`, {datetime.date.today()}, CPU ({platform.machine()}, "
        f"{torch.get_num_threads()} threads), torch {torch.__version__}, random Qwen3 of 4 layers, float32.",
    ]
    for title, make in zip(titles, given, strict=True):
        made = make()
        print(title, *made, sep="\n", flush=True)
        lines += ["", title, "", *made]
    text = "\n".join(lines) + "\n"
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
