"""Capacity and distillation against their definitions."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, softmax

from mlx_kvret.cuda_backend.training.loss import active, capacity, distillation
from mlx_kvret.mlx_backend.training.loss import capacity as mlx_capacity


@pytest.mark.parametrize("slack", [0.0, 0.4])
@pytest.mark.parametrize("scope", ["global", "head"])
def test_capacity_is_the_definition(scope, slack):
    rng = np.random.default_rng(0)
    budget, heads = 3, 4
    position = np.array([[*range(6), *range(5), -1], [*range(12)]])
    size = rng.uniform(0, 12, (2, heads, 12)).astype(np.float32)
    total = 0.0
    for row in range(2):
        for place in range(12):
            t = position[row, place]
            if t < budget:
                continue
            if scope == "global":
                room = max((t - budget) * heads, 1)
                total += max(0, (size[row, :, place].sum() - budget * heads) / room - slack)
            else:
                excess = [(s - budget) / max(t - budget, 1) - slack for s in size[row, :, place]]
                total += np.mean([max(0, e) for e in excess])
    where = torch.from_numpy(position)
    found = capacity(torch.from_numpy(size), where, budget, scope, slack)
    assert found.item() == pytest.approx(total, rel=1e-5)
    on_mlx = mlx_capacity(mx.array(size), mx.array(position), budget, scope, slack)
    assert on_mlx.item() == pytest.approx(total, rel=1e-5)
    assert active(where, budget).sum() == 3 + 2 + 9


@pytest.mark.parametrize("elements", [1, 30, 1 << 20])
def test_distillation_in_chunks(elements):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11, bias=False).requires_grad_(False)
    student, teacher = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    target = torch.randint(11, (7,))
    kl, ce = distillation(head, student, teacher, target, 11, elements)
    p, q = softmax(head(teacher), -1), softmax(head(student), -1)
    assert kl.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert ce.item() == pytest.approx(cross_entropy(head(student), target, reduction="sum").item(), rel=1e-5)
    (mine,) = torch.autograd.grad(kl + 2 * ce, student)
    expected = 3 * q - p - 2 * torch.nn.functional.one_hot(target, 11)
    assert torch.allclose(mine, expected @ head.weight, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_at_once():
    rows = []

    def head(hidden):
        rows.append(len(hidden))
        return hidden @ torch.eye(8, 100)

    kl, ce = distillation(
        head, torch.randn(64, 8, requires_grad=True), torch.randn(64, 8), torch.zeros(64).long(), 100, 900
    )
    (kl + ce).backward()
    assert max(rows) == 9


def test_nothing_to_learn():
    empty = torch.randn(0, 8)
    assert distillation(torch.nn.Linear(8, 5), empty, empty, torch.zeros(0).long(), 5) == (0, 0)
