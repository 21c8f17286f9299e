"""Train the demo model and its gates, and rewrite mlx_kvret/demo: ``python examples/train_demo``."""

from __future__ import annotations

import argparse

import torch
from evaluate import accuracy, fresh_stories
from package import write_gates, write_model, write_story
from train_gates import PEAK_RATE, STEPS, TOKENS, Gates, train_gates
from train_model import train_model
from transformers import Qwen3ForCausalLM

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.demo import GATES, MODEL, STORY
from mlx_kvret.demo.language import story

VALIDATION_SEED, STORY_SEED = 7, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-seed", type=int, default=0)
    parser.add_argument("--gate-seeds", type=int, nargs="+", default=[0, 1, 2], help="the best one is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)

    model = train_model(options.model_seed)
    trials = []
    for seed in options.gate_seeds:
        gates = train_gates(model, seed)
        trials.append((validate(model, gates), seed, gates))
        print(f"gates {seed}: validation accuracy {trials[-1][0]:.3f}", flush=True)
    best, seed, gates = max(trials, key=lambda trial: trial[0])
    write_model(MODEL, model)
    write_gates(
        GATES,
        gates,
        {
            "command": "python examples/train_demo",
            "model_seed": options.model_seed,
            "gate_seed": seed,
            "validation_accuracy": {str(seed): round(score, 4) for score, seed, _ in trials},
            "steps": STEPS,
            "tokens": TOKENS,
            "learning_rate": PEAK_RATE,
        },
    )
    write_story(STORY, story(4096, seed=STORY_SEED))
    print(f"wrote {MODEL.parent} with gates of seed {seed} ({best:.3f})")


def validate(model: Qwen3ForCausalLM, gates: Gates) -> float:
    """Mean accuracy on 10 stories each of 1,024 tokens at 1/64 and of 4,096 at 1/32."""
    cases = [(1024, 16), (4096, 128)]
    return sum(
        accuracy(
            model,
            gates,
            fresh_stories(tokens, 10, VALIDATION_SEED),
            32,
            EvictionConfig.create(budget, buffer=0),
        )[0]
        for tokens, budget in cases
    ) / len(cases)


if __name__ == "__main__":
    main()
