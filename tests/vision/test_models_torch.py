"""Bounded vision-language models of transformers against stock ones, with their own vision towers."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import mlx_kvret
from mlx_kvret.cuda_backend.cache import BoundedCache

from .oracle_torch import Kept, calls, expected_logits, read, relative, stock_logits, whole, with_positions
from .tiny_torch import IMAGE, SERVED, stock_cache, tiny_model

NEAR = 2e-6
SMALL = {"budget": 8, "buffer": 2}


@pytest.fixture(scope="module", params=SERVED)
def named(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    return request.param, tiny_model(request.param)


def large(model: PreTrainedModel) -> BoundedCache:
    return mlx_kvret.make_cache(model, budget=4096, policy="recent")


def test_a_large_budget_equals_the_stock_model(named: tuple[str, PreTrainedModel]) -> None:
    name, model = named
    expected = read(model, stock_cache(model), with_positions(model, name))
    mlx_kvret.attach(model, None)
    cache = large(model)
    found = read(model, cache, calls(name))
    assert relative(found, expected) < NEAR
    assert [(p.start, p.end) for p in cache.pictures] == [
        (int(a) + 1, int(b)) for a, b in zip(*_ends(name), strict=True)
    ]
    full = read(model, mlx_kvret.make_cache(model, policy="full"), calls(name))
    assert relative(full, expected) < NEAR
    mlx_kvret.detach(model)
    # the model is as it was
    assert torch.equal(stock_logits(model, name), stock_logits(tiny_model(name), name))


def _ends(name: str) -> tuple[list[int], list[int]]:
    ids = whole(name)["input_ids"][0]
    seen = (ids == IMAGE).int()
    steps = torch.diff(torch.nn.functional.pad(seen, (1, 1)))
    return (torch.where(steps == 1)[0] - 1).tolist(), torch.where(steps == -1)[0].tolist()


@pytest.mark.parametrize(
    ("policy", "scope"), [("random", "global"), ("keydiff", "global"), ("knorm", "head")]
)
def test_what_is_kept_decides(named: tuple[str, PreTrainedModel], policy: str, scope: str) -> None:
    name, model = named
    mlx_kvret.attach(model, None)
    cache, kept = mlx_kvret.make_cache(model, **SMALL, policy=policy, scope=scope), Kept()
    found = read(model, cache, calls(name), kept.record)
    mlx_kvret.detach(model)
    assert relative(found, expected_logits(model, name, kept)) < NEAR
    # something has gone, and pictures may be a part of what is left
    assert cache.entries < cache.seen * len(cache.competing) * 2
