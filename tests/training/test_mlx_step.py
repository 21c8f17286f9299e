"""Training on MLX against training on torch: the same model, gates and batch in both."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_kvret.core.config import GateConfig
from mlx_kvret.cuda_backend.gates import RetentionGates as TorchGates
from mlx_kvret.cuda_backend.gates import to_arrays
from mlx_kvret.cuda_backend.training import step as torch_step
from mlx_kvret.cuda_backend.training.processes import Single
from mlx_kvret.cuda_backend.training.student import Student as TorchStudent
from mlx_kvret.mlx_backend.api import load_network
from mlx_kvret.mlx_backend.gates import RetentionGates
from mlx_kvret.mlx_backend.training.step import gradient
from mlx_kvret.mlx_backend.training.student import Student
from mlx_kvret.training.config import TrainConfig

from .test_step import packed
from .tiny_models import tiny_model

CONFIG = TrainConfig(budget=5, length=32, capacity_weight=0.7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny qwen3 written by transformers."""
    folder = tmp_path_factory.mktemp("qwen3")
    tiny_model("qwen3").save_pretrained(folder)
    return folder


def both_gates(kind="rg10", bias=2.0):
    """The same random gates in both backends."""
    torch.manual_seed(3)
    config = GateConfig(kind, 2, 2, 32, width=16, bias_init=bias, shared_projection=kind == "rg10")
    theirs, ours = TorchGates(config), RetentionGates(config)
    ours.load_weights([(name, mx.array(x)) for name, x in to_arrays(theirs).items()])
    return ours, theirs


def compare(student, scope="global", kind="rg10", micro_batch=1, tolerance=1e-4, sinks=0, slack=0.0):
    config = TrainConfig(**CONFIG.to_dict() | {"scope": scope, "sinks": sinks})
    ours, theirs = both_gates(kind)
    losses, found = gradient(student, ours, packed(), config, micro_batch, slack)
    torch_student = TorchStudent(tiny_model("qwen3"))
    expected = torch_step.gradient(torch_student, theirs, packed(), config, Single("cpu"), micro_batch, slack)
    assert vars(losses) == pytest.approx(vars(expected), rel=1e-4, abs=1e-7)
    found = {name: np.array(x) for name, x in tree_flatten(found)}
    right = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    assert found.keys() == right.keys()
    for name, wanted in right.items():
        assert np.abs(wanted).max() > 0
        assert np.abs(found[name] - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(
    "scope, kind, recompute", [("global", "rg10", True), ("head", "rg", True), ("global", "rg10", False)]
)
def test_gradients_equal_torch(saved, scope, kind, recompute):
    compare(Student(load_network(saved)[0], recompute), scope, kind)


def test_sinks_and_slack(saved):
    compare(Student(load_network(saved)[0]), sinks=2, slack=0.3)


def test_micro_batches(saved):
    compare(Student(load_network(saved)[0]), micro_batch=2)


def test_blocks_and_chunks(saved, monkeypatch):
    for module, name in (("attention", "BLOCK"), ("soft_size", "BLOCK"), ("loss", "CHUNK")):
        monkeypatch.setattr(f"mlx_kvret.mlx_backend.training.{module}.{name}_ELEMENTS", 700)
    compare(Student(load_network(saved)[0]))


def test_gradients_flow_through_a_quantised_base(saved):
    """Against the same weights dequantised, in float32 both."""
    model, plain = load_network(saved)[0], load_network(saved)[0]
    nn.quantize(
        model, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[1] == 32
    )
    for (_, quantised), (_, own) in zip(model.named_modules(), plain.named_modules(), strict=True):
        if isinstance(quantised, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            own.weight = mx.dequantize(quantised.weight, quantised.scales, quantised.biases, 32, 4)
    results = [gradient(Student(m), both_gates()[0], packed(), CONFIG, 2) for m in (model, plain)]
    assert results[0][0].loss == pytest.approx(results[1][0].loss, rel=1e-4)
    pairs = zip(*(tree_flatten(found) for _, found in results), strict=True)
    for (name, found), (_, expected) in pairs:
        assert mx.abs(found - expected).max() <= 1e-3 * mx.abs(expected).max(), name
