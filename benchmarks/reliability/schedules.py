"""Random schedules of reading, looking and taking back on both backends, against the policy in numpy.

    python benchmarks/reliability/schedules.py [--count 10000] [--seed 0]

Each schedule has a random configuration (budget, buffer, scope, policy, protections, threshold), log β with
many ties, and random chunks; both backends' caches are fed the same and must keep what numpy keeps. No model
runs: a schedule takes about 50 ms on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import due_groups, select
from mlx_kvret.core.policies import random_score, recent_score
from mlx_kvret.core.retention import retention_score
from mlx_kvret.cuda_backend.bounded import Bounded as TorchBounded
from mlx_kvret.mlx_backend.bounded import Bounded as MLXBounded

SHAPE = CacheShape(layers=2, kv_heads=2, key_dim=2, value_dim=2, itemsize=4, hidden_size=2)
HEADS = SHAPE.heads


def configuration(chance: np.random.Generator) -> EvictionConfig:
    """A random configuration of up to 9 tokens per head."""
    policy = str(chance.choice(["learned", "learned", "learned", "recent", "random"]))
    budget = int(chance.integers(1, 10))
    sinks = int(chance.integers(0, budget + 1)) if chance.random() < 0.3 else 0
    options: dict[str, Any] = {
        "policy": policy,
        "scope": str(chance.choice(["global", "layer", "head"])),
        "sinks": sinks,
        "window": int(chance.integers(0, budget - sinks + 1)) if chance.random() < 0.3 else 0,
        "min_per_head": int(chance.integers(0, budget + 1)) if chance.random() < 0.3 else 0,
    }
    if policy == "learned" and chance.random() < 0.4:
        options["lookahead"] = int(chance.integers(1, 6))
        options["threshold"] = float(chance.choice([1e-3, 0.5, 1.0]))
    return EvictionConfig(**options, budget=budget, buffer=int(chance.integers(0, 6)))


class Oracle:
    """What a cache should hold, by :func:`mlx_kvret.core.eviction.select`."""

    def __init__(self, config: EvictionConfig) -> None:
        self.config, self.seen = config, 0
        self.log_beta = np.zeros((HEADS, 0), np.float32)
        self.position, self.head = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def read(self, log_beta: np.ndarray) -> None:
        count = log_beta.shape[1]
        self.log_beta = np.concatenate([self.log_beta, log_beta], 1)
        self.position = np.r_[self.position, np.tile(np.arange(self.seen, self.seen + count), HEADS)]
        self.head = np.r_[self.head, np.repeat(np.arange(HEADS), count)]
        self.seen += count

    def take_back(self, count: int) -> None:
        self.seen -= count
        self.log_beta = self.log_beta[:, : self.seen]
        stay = self.position < self.seen
        self.position, self.head = self.position[stay], self.head[stay]

    def settle(self) -> None:
        rule = self.config, SHAPE.layers, SHAPE.kv_heads
        if not due_groups(np.bincount(self.head, minlength=HEADS), *rule).any():
            return
        if self.config.policy == "learned":
            own = self.log_beta[self.head, self.position]
            score = retention_score(own, self.position, self.seen, self.config.lookahead)
        elif self.config.policy == "recent":
            score = recent_score(self.position)
        else:
            score = random_score(self.position, self.head, self.config.policy_seed)
        keep = select(score, self.position, self.head, self.seen, *rule)
        self.position, self.head = self.position[keep], self.head[keep]

    def kept(self) -> list[list[int]]:
        return [sorted(self.position[self.head == head].tolist()) for head in range(HEADS)]


def _gates() -> Any:
    """Gates whose input is their answer: log β of a layer's two heads."""
    return SimpleNamespace(
        log_beta=lambda layer, x: x, log_betas=lambda x: x, stacked=tuple(range(SHAPE.layers))
    )


def read(name: str, cache: Any, log_beta: np.ndarray) -> None:
    """One pass over tokens of that log β (heads, tokens)."""
    count, make = log_beta.shape[1], mx.array if name == "mlx" else torch.from_numpy
    if name == "mlx":
        cache.prepare(count)
        cache.reading, before = cache.begin(count)
        cache.passes.begin(before)
    else:
        cache.begin(1, count)
    for layer in range(SHAPE.layers):
        x = log_beta[layer * 2 : layer * 2 + 2].T[None].copy()
        zeros = np.zeros((1, 2, count, 2), np.float32)
        cache.reading.observe(layer, make(x))
        cache.reading.append(layer, make(zeros), make(zeros))
    if name == "mlx":
        cache.finish()
        cache.passes.commit()
    else:
        cache.commit()


def schedule(seed: int) -> list[str]:
    """Faults of one random schedule."""
    chance = np.random.default_rng(seed)
    config, faults = configuration(chance), []
    gates = _gates() if config.policy == "learned" else None
    backends: dict[str, Any] = {
        "mlx": MLXBounded.single(SHAPE, config, {}, gates),
        "torch": TorchBounded.single(SHAPE, config, {}, torch.device("cpu"), gates),
    }
    oracle = Oracle(config)
    for step in range(int(chance.integers(3, 12))):
        oracle.settle()
        count = int(chance.integers(1, 13)) if chance.random() < 0.5 else 1
        # few values, so that ties are common
        log_beta = -chance.integers(0, 4, (HEADS, count)).astype(np.float32)
        for name, backend in backends.items():
            read(name, backend, log_beta)
        oracle.read(log_beta)
        if chance.random() < 0.3:
            back = int(chance.integers(1, count + 1))
            oracle.take_back(back)
            for backend in backends.values():
                backend.take_back(back)
        if chance.random() < 0.4 or step > 8:
            oracle.settle()
            expected = oracle.kept()
            for name, backend in backends.items():
                found = [head.tolist() for layer in backend.kept_positions() for head in layer]
                if found != expected:
                    faults.append(f"{name}, schedule {seed}, step {step}: {found}, expected {expected}")
    return faults


def run(count: int = 10_000, seed: int = 0) -> dict[str, int]:
    """``count`` schedules; how many of them had a fault on either backend."""
    wrong = 0
    for one in range(seed, seed + count):
        faults = schedule(one)
        wrong += bool(faults)
        for fault in faults[:1]:
            print(fault, file=sys.stderr)
    return {"schedules": count, "faults": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="schedules (10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one (0)")
    options = parser.parse_args()
    begun = time.perf_counter()
    found = run(options.count, options.seed)
    took = time.perf_counter() - begun
    print(
        f"{found['schedules']:,} random schedules on both backends: {found['faults']} faults ({took:.0f} s)"
    )
