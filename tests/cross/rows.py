"""Random schedules of rows that join, leave, split, are copied and read at their own pace.

Whatever happens around it, a row must keep and say what it would alone. A :class:`Host` is a backend with one
way to do each of these things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_kvret.core.config import EvictionConfig

WORDS = 50
ACTS = ("join", "read", "read", "decode", "decode", "filter", "split", "copy", "row")
Chunk = list[int]


class Host(Protocol):
    """Caches of one backend; a cache may hold several rows."""

    def new(self, config: EvictionConfig) -> Any:
        """An empty cache of one row."""

    def read(self, cache: Any, chunks: list[Chunk]) -> list[np.ndarray]:
        """One pass that brings each row its own tokens, maybe none: outputs (tokens, width) of each."""

    def kept(self, cache: Any, row: int) -> str:
        """The positions that a row has kept."""

    def extend(self, cache: Any, other: Any) -> Any:
        """The rows of both, in order, as one cache; neither is used afterwards."""

    def filter(self, cache: Any, keep: list[int]) -> Any:
        """These rows, in this order; the cache is not used afterwards."""

    def split(self, cache: Any, which: list[int]) -> tuple[Any, Any]:
        """These rows, and the others; the cache is not used afterwards."""

    def copy(self, cache: Any) -> Any:
        """The same rows once more, cheaply."""

    def row(self, cache: Any, index: int) -> Any:
        """One row once more, as a cache of its own."""

    def own(self, cache: Any) -> Any:
        """The same rows once more, in arrays of their own."""


@dataclass
class Twins:
    """Caches, each with its rows' twins that are alone."""

    cache: Any
    alone: list[Any]


def configuration(chance: np.random.Generator) -> EvictionConfig:
    """What all rows of a schedule have in common but for budget and buffer."""
    policy = str(chance.choice(["learned", "learned", "recent", "random", "keydiff"]))
    options: dict[str, Any] = {"policy": policy, "scope": str(chance.choice(["global", "layer", "head"]))}
    if policy == "learned" and chance.random() < 0.3:
        options["threshold"] = float(chance.choice([1e-2, 0.5]))
    return EvictionConfig(budget=1, buffer=0, **options)


def schedule(host: Host, seed: int, steps: int = 14) -> list[str]:
    """Faults of one random schedule."""
    chance = np.random.default_rng(seed)
    rule = configuration(chance)
    batches = [Twins(*_row(host, rule, chance))]
    faults: list[str] = []
    for step in range(steps):
        at = int(chance.integers(len(batches)))
        act = str(
            chance.choice(["join", "read", "read", "decode", "decode", "filter", "split", "copy", "row"])
        )
        _do(host, rule, chance, batches, at, act, faults)
        for batch in batches:
            for index, alone in enumerate(batch.alone):
                ours, theirs = host.kept(batch.cache, index), host.kept(alone, 0)
                if ours != theirs:
                    faults.append(f"row {index} keeps {ours}, alone {theirs}")
        if faults:
            return [f"schedule {seed}, step {step} ({act}): {fault}" for fault in faults]
    return []


def _row(host: Host, rule: EvictionConfig, chance: np.random.Generator) -> tuple[Any, list[Any]]:
    """A row of its own budget that has read something, and its twin."""
    own = {"budget": int(chance.integers(1, 9)), "buffer": int(chance.integers(0, 5))}
    config = EvictionConfig(**rule.to_dict() | own)
    pair = [host.new(config), host.new(config)]
    for _ in range(int(chance.integers(0, 3))):
        tokens = _tokens(chance, int(chance.integers(1, 12)))
        for cache in pair:
            host.read(cache, [tokens])
    return pair[0], pair[1:]


def _tokens(chance: np.random.Generator, count: int) -> Chunk:
    return [int(token) for token in chance.integers(0, WORDS, count)]


def _do(
    host: Host,
    rule: EvictionConfig,
    chance: np.random.Generator,
    batches: list[Twins],
    at: int,
    act: str,
    faults: list[str],
) -> None:
    batch, rows = batches[at], len(batches[at].alone)
    if act == "join":
        if len(batches) > 1 and chance.random() < 0.5:
            other = batches.pop((at + 1) % len(batches))
        else:
            other = Twins(*_row(host, rule, chance))
        if rows + len(other.alone) > 6:
            other = Twins(*_row(host, rule, chance))
        batch.cache = host.extend(batch.cache, other.cache)
        batch.alone += other.alone
    elif act in ("read", "decode"):
        for _ in range(1 if act == "read" else int(chance.integers(1, 9))):
            counts = chance.integers(0, 9, rows) if act == "read" else np.ones(rows, int)
            counts[int(chance.integers(rows))] += not counts.any()
            chunks = [_tokens(chance, int(count)) for count in counts]
            found = host.read(batch.cache, chunks)
            for index, (own, chunk) in enumerate(zip(found, chunks, strict=True)):
                expected = host.read(batch.alone[index], [chunk])[0] if chunk else own
                if not np.allclose(own, expected, rtol=1e-5, atol=1e-5):
                    faults.append(f"row {index} differs by {np.abs(own - expected).max():.1e} from it alone")
    elif act == "filter":
        keep = [int(i) for i in chance.permutation(rows)[: int(chance.integers(1, rows + 1))]]
        batch.cache = host.filter(batch.cache, keep)
        batch.alone = [batch.alone[index] for index in keep]
    elif act == "split" and rows > 1:
        which = sorted(int(i) for i in chance.permutation(rows)[: int(chance.integers(1, rows))])
        left, batch.cache = host.split(batch.cache, which)
        batches.append(Twins(left, [batch.alone[index] for index in which]))
        batch.alone = [one for index, one in enumerate(batch.alone) if index not in which]
    elif act == "copy":
        made = (host.copy if chance.random() < 0.7 else host.own)(batch.cache)
        batches.append(Twins(made, [host.own(alone) for alone in batch.alone]))
    elif act == "row":
        index = int(chance.integers(rows))
        batches.append(Twins(host.row(batch.cache, index), [host.own(batch.alone[index])]))
    if len(batches) > 4:
        batches.pop(int(chance.integers(len(batches))))


def run(host: Host, count: int, seed: int = 0) -> list[str]:
    """The faults of ``count`` schedules."""
    return [fault for one in range(seed, seed + count) for fault in schedule(host, one)[:1]]
