"""The gradient of a packed batch against the definition, one document at a time in eager attention."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mlx_kvret.core.config import GateConfig
from mlx_kvret.cuda_backend.gates import RetentionGates
from mlx_kvret.cuda_backend.kernels.soft_size import naive_soft_size
from mlx_kvret.cuda_backend.training.processes import Single
from mlx_kvret.cuda_backend.training.step import gradient
from mlx_kvret.cuda_backend.training.student import Student
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.packing import Batch

from .tiny_models import tiny_model

LAYERS, HEADS = 2, 2
LENGTHS = ((20, 9), (25,))


def documents():
    """Rows of documents as (ids, whether each token is to be learnt)."""
    rng = np.random.default_rng(0)
    return [[(rng.integers(99, size=n), rng.random(n) < 0.6) for n in row] for row in LENGTHS]


def packed():
    shape = (2, 32)
    batch = Batch(
        np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, bool)
    )
    for row, pieces in enumerate(documents()):
        begin = 0
        for ids, learn in pieces:
            end = begin + len(ids)
            batch.ids[row, begin:end], batch.starts[row, begin:end] = ids, begin
            batch.position[row, begin:end] = np.arange(len(ids))
            batch.learn[row, begin : end - 1] = learn[1:]
            begin = end
        batch.starts[row, begin:] = begin
    return batch


def definition(model, gates, config):
    """The loss as it is written down, with a T×T bias in stock eager attention."""
    log_betas = []

    def bias(layer, _, args, kwargs):
        log_beta = gates.log_beta(layer, kwargs["hidden_states"])
        log_beta = torch.cat([torch.zeros_like(log_beta[:, : config.sinks]), log_beta[:, config.sinks :]], 1)
        log_betas.append(log_beta.transpose(1, 2))
        place = torch.arange(log_beta.shape[1])
        age = place[:, None] - place
        mask = (age * log_betas[-1][:, :, None]).masked_fill(age < 0, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask.repeat_interleave(2, 1)}

    kl, ce, hinge, learnt, over = [], [], [], 0, 0
    for ids, learn in (document for row in documents() for document in row):
        ids, learn = torch.from_numpy(ids)[None], torch.from_numpy(learn)[1:]
        with torch.no_grad():
            teacher = model(input_ids=ids, use_cache=False).logits[0, :-1][learn]
        hooks = [
            block.self_attn.register_forward_pre_hook(
                lambda *call, own=layer: bias(own, *call), with_kwargs=True
            )
            for layer, block in enumerate(model.model.layers)
        ]
        log_betas.clear()
        student = model(input_ids=ids, use_cache=False).logits[0, :-1][learn]
        for hook in hooks:
            hook.remove()
        p, q = log_softmax(teacher, -1), log_softmax(student, -1)
        kl.append(kl_div(q, p, log_target=True, reduction="sum"))
        ce.append(cross_entropy(student, ids[0, 1:][learn], reduction="sum"))
        learnt += int(learn.sum())
        size = naive_soft_size(torch.cat(log_betas, 1), torch.zeros_like(ids))[0]
        m, n = config.budget, LAYERS * HEADS
        for t in range(m, ids.shape[1]):
            over += 1
            if config.scope == "global":
                hinge.append(((size[:, t].sum() - m * n) / max((t - m) * n, 1)).clamp(min=0))
            else:
                hinge.append(((size[:, t] - m) / max(t - m, 1)).clamp(min=0).mean())
    kl, ce, hinge = sum(kl) / learnt, sum(ce) / learnt, sum(hinge) / over
    return (kl + ce) / 2 + config.capacity_weight * hinge, kl, ce, hinge


@pytest.mark.parametrize("scope", ["global", "head"])
@pytest.mark.parametrize("micro_batch, sinks", [(1, 0), (2, 0), (1, 2)])
def test_equals_the_definition(scope, micro_batch, sinks):
    config = TrainConfig(scope=scope, budget=5, length=32, capacity_weight=0.7, sinks=sinks)
    torch.manual_seed(0)
    gates = RetentionGates(GateConfig("rg10", LAYERS, HEADS, 32, width=16, bias_init=2.0))
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation("eager")
    loss, kl, ce, hinge = definition(model, gates, config)
    expected = torch.autograd.grad(loss, list(gates.parameters()))

    found = gradient(Student(tiny_model("llama")), gates, packed(), config, Single("cpu"), micro_batch)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.cross_entropy == pytest.approx(ce.item(), rel=1e-5)
    assert found.capacity == pytest.approx(hinge.item(), rel=1e-5)
    for weight, right in zip(gates.parameters(), expected, strict=True):
        assert (weight.grad - right).norm() <= 1e-4 * right.norm()
