"""What a cache keeps against the numpy policy, at every compaction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rounding import assert_near

from mlx_kvret.core import policies
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import due_groups, select
from mlx_kvret.core.retention import retention_score
from mlx_kvret.cuda_backend.reading import Reading

from .tiny import attached, new_cache, run

L, H = 3, 2
IDS = torch.randint(1, 96, (1, 120), generator=torch.Generator().manual_seed(9))
STEPS = [17, 1, 1, 30, 5, *[1] * 20, 40, *[1] * 6]
OPTIONS: list[dict[str, Any]] = [
    {"scope": "global"},
    {"scope": "layer"},
    {"scope": "head"},
    {"scope": "global", "min_per_head": 2, "sinks": 2, "window": 3},
    {"scope": "layer", "threshold": 0.05, "window": 2},
    {"scope": "head", "threshold": 0.3},
    {"scope": "global", "threshold": 0.9, "min_per_head": 1},
    {"scope": "head", "lookahead": 7},
    {"scope": "global", "buffer": 0},
    {"policy": "recent"},
    {"policy": "random", "policy_seed": 3},
    {"policy": "knorm", "scope": "layer"},
    {"policy": "keydiff", "scope": "global"},
]


class Oracle:
    """All entries of one sequence in numpy, evicted by the reference."""

    def __init__(self, config: EvictionConfig) -> None:
        self.config, self.seen = config, 0
        self.position = self.head = np.zeros(0, np.int64)
        self.compactions = 0

    def step(self, tokens: int, log_beta: np.ndarray, keys: np.ndarray) -> None:
        """``log_beta`` (L·H, seen) and ``keys`` (L·H, seen, D) of all tokens so far."""
        new = np.arange(self.seen, self.seen + tokens)
        self.seen += tokens
        self.position = np.concatenate([self.position, np.tile(new, L * H)])
        self.head = np.concatenate([self.head, np.repeat(np.arange(L * H), tokens)])
        due = due_groups(np.bincount(self.head, minlength=L * H), self.config, L, H)
        if due.any():
            score = self.score(log_beta, keys[self.head, self.position])
            stays = select(score, self.position, self.head, self.seen, self.config, L, H)
            self.position, self.head = self.position[stays], self.head[stays]
            self.compactions += 1

    def score(self, log_beta: np.ndarray, keys: np.ndarray) -> np.ndarray:
        config = self.config
        if config.policy == "learned":
            own = log_beta[self.head, self.position]
            return retention_score(own, self.position, self.seen, config.lookahead)
        return {
            "recent": lambda: policies.recent_score(self.position),
            "random": lambda: policies.random_score(self.position, self.head, config.policy_seed),
            "knorm": lambda: policies.knorm_score(keys),
            "keydiff": lambda: policies.keydiff_score(keys, self.head, L * H),
        }[config.policy]()

    def kept(self) -> list[list[list[int]]]:
        heads = [sorted(self.position[self.head == flat].tolist()) for flat in range(L * H)]
        return [heads[i : i + H] for i in range(0, L * H, H)]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.Tensor]]:
    """All keys that were ever appended, by layer."""
    seen: dict[int, list[torch.Tensor]] = {}
    stock = Reading.append

    def append(self: Reading, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Any:
        seen.setdefault(layer, []).append(keys)
        return stock(self, layer, keys, values)

    monkeypatch.setattr(Reading, "append", append)
    return seen


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kept_entries_are_those_of_the_reference(
    options: dict[str, Any], keys: dict[int, list[torch.Tensor]]
) -> None:
    model, made = attached("llama")
    cache = new_cache(model, **{"budget": 12, "buffer": 5} | options)
    keys.clear()  # of the model's own trial
    oracle = Oracle(cache.shared.config)
    for part in IDS.split(STEPS, 1):
        run(model, part, cache)
        kept = [[head.tolist() for head in layer] for layer in cache.kept_positions()]
        all_keys = torch.cat([torch.cat(keys[layer], 2)[0] for layer in range(L)]).numpy()
        log_beta = np.zeros(0) if cache.shared.arena.gates is None else made.gates.history()
        oracle.step(part.shape[1], log_beta, all_keys)
        assert kept == oracle.kept()
        assert cache.entries == sum(len(head) for layer in kept for head in layer)
    assert oracle.compactions > 5


@pytest.mark.parametrize("options", OPTIONS[:8:3] + OPTIONS[4:5] + OPTIONS[10:], ids=str)
def test_rows_of_a_batch_are_treated_as_if_alone(options: dict[str, Any]) -> None:
    model, _ = attached("llama")
    options = {"budget": 12, "buffer": 5} | options
    lengths = [90, 33, 61]
    # no token twice: the norms of equal tokens' keys are equal but for rounding
    ids = torch.stack([torch.randperm(95)[:90] + 1 for _ in lengths])
    mask = torch.arange(90) >= 90 - torch.tensor(lengths)[:, None]
    place = (mask.cumsum(1) - 1).clamp(min=0)
    together, alone = new_cache(model, **options), [new_cache(model, **options) for _ in lengths]
    for end in [25, 26, 60, *range(61, 91)]:
        start = together.seen
        part = slice(start, end)
        logits = run(model, ids[:, part], together, attention_mask=mask[:, :end], position_ids=place[:, part])
        for row, (cache, length) in enumerate(zip(alone, lengths, strict=True)):
            own = ids[row : row + 1, max(start, 90 - length) : end]
            if own.shape[1]:
                expected, ours = run(model, own, cache), logits[row : row + 1, -own.shape[1] :]
                assert_near(ours, expected, 128)
                assert str(together.kept_positions(row)) == str(cache.kept_positions())
    assert together.entries == sum(cache.entries for cache in alone)


def test_a_batch_generates_what_its_rows_generate() -> None:
    model, _ = attached("llama")
    ids = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    ids[1, :13] = 0
    mask = (ids != 0).long()
    options = {"max_new_tokens": 15, "do_sample": False}
    together = model.generate(
        ids, attention_mask=mask, cache=new_cache(model, budget=10, buffer=4), prefill_chunk_size=8, **options
    )
    for row, start in enumerate([0, 13]):
        # the same chunk borders as in the batch
        cache, own = new_cache(model, budget=10, buffer=4), ids[row : row + 1, start:]
        for end in range(8, 40, 8):
            if end > start:
                run(model, ids[row : row + 1, max(start, end - 8) : end], cache)
        out = model.generate(own, cache=cache, **options)
        assert torch.equal(together[row, start:], out[0])
