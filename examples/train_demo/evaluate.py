"""How well the shipped demo answers within a budget: ``python examples/train_demo/evaluate.py --help``."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from bounded import Reader
from train_gates import Gates
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.demo import GATES, MODEL
from mlx_kvret.demo.language import Story, story

METHODS: dict[str, dict[str, Any]] = {
    "gates, global": {},
    "gates, per head": {"scope": "head"},
    "sinks + window": {"policy": "recent"},
}


def fresh_stories(tokens: int, count: int, seed: int) -> list[Story]:
    """Stories with 16 facts; other seeds give other stories."""
    return [story(tokens, seed=rng) for rng in np.random.default_rng(seed).spawn(count)]


def accuracy(
    model: Qwen3ForCausalLM, gates: Gates, stories: list[Story], chunk: int, eviction: EvictionConfig | None
) -> tuple[float, float]:
    """Mean share of facts answered and its standard error over stories."""
    shares = []
    for text in stories:
        reader = Reader(model, gates, eviction)
        reader.read(text.ids, chunk)
        shares.append(reader.ask(text))
    return float(np.mean(shares)), float(np.std(shares, ddof=1) / len(shares) ** 0.5)


def shipped() -> tuple[Qwen3ForCausalLM, Gates]:
    """The model and the gates of the package."""
    gates, stored = Gates(), load_gates(GATES)
    with torch.no_grad():
        for name, weight in gates.named_tensors().items():
            weight.copy_(torch.from_numpy(stored.tensors[name].float32()))
    return AutoModelForCausalLM.from_pretrained(MODEL), gates.eval()


def table(
    model: Qwen3ForCausalLM, gates: Gates, stories: list[Story], chunk: int, fractions: list[int]
) -> None:
    """Print the accuracy of every method at every budget, as a fraction of the stories' tokens."""
    tokens = len(stories[0].ids)
    print(f"T = {tokens}, chunk {chunk}, n = {len(stories)}, budgets {' '.join(f'T/{f}' for f in fractions)}")
    rows = {"full cache": [None]} | {
        name: [EvictionConfig.create(tokens // f, buffer=0, **options) for f in fractions]
        for name, options in METHODS.items()
    }
    for name, evictions in rows.items():
        cells = [accuracy(model, gates, stories, chunk, eviction) for eviction in evictions]
        print(f"  {name:16}", "  ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--chunk", type=int, nargs="+", default=[32])
    parser.add_argument("--fraction", type=int, nargs="+", default=[16, 32, 64], help="budgets T/F per head")
    parser.add_argument("--stories", type=int, default=30)
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, gates = shipped()
    for tokens in options.tokens:
        stories = fresh_stories(tokens, options.stories, options.seed)
        for chunk in options.chunk:
            table(model, gates, stories, chunk, options.fraction)


if __name__ == "__main__":
    main()
