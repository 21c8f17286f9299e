"""The hooked base model: it is the stock model as the teacher, and decays as the student."""

import pytest
import torch
from rounding import assert_near
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from mlx_kvret.core.config import GateConfig
from mlx_kvret.cuda_backend.gates import RetentionGates
from mlx_kvret.cuda_backend.training.student import Student
from mlx_kvret.errors import UnsupportedModelError

from .tiny_models import tiny_model

IDS = torch.randint(99, (2, 60), generator=torch.Generator().manual_seed(0))
STARTS = torch.zeros(2, 60, dtype=torch.long)
STARTS[1, 25:] = 25


def gates_for(student, bias=3.0, kind="rg10"):
    torch.manual_seed(1)
    shape = (student.layers, student.kv_heads, student.hidden_size)
    return RetentionGates(
        GateConfig(kind, *shape, width=16, bias_init=bias, shared_projection=kind == "rg10")
    )


def gradient(student, gates):
    gates.zero_grad()
    trace = student.learn(IDS, STARTS, gates)
    weight = torch.randn(trace.hidden.shape, generator=torch.Generator().manual_seed(2))
    ((trace.hidden.float() * weight).mean() + trace.log_beta.mean()).backward()
    return trace, [p.grad.clone() for p in gates.parameters()]


def test_teacher_is_the_stock_model_on_each_document(model):
    parts = [IDS[:1], IDS[1:, :25], IDS[1:, 25:]]
    with torch.no_grad():
        stock = [model(input_ids=part).logits[0] for part in parts]
    student = Student(model)
    for part, expected in zip(parts, stock, strict=True):
        hidden = student.teach(part, torch.zeros_like(part)).hidden
        assert_near(student.logits(hidden[0]), expected, 64)
    if not student.packs:
        return
    hidden = student.teach(IDS, STARTS).hidden
    assert_near(student.logits(hidden[0]), stock[0], 64)
    assert_near(student.logits(hidden[1]), torch.cat(stock[1:]), 64)


def test_open_gates_change_nothing_and_closed_ones_do(model):
    student = Student(model)
    teacher = student.teach(IDS, STARTS).hidden
    opened = student.learn(IDS, STARTS, gates_for(student, 80.0))
    assert_near(opened.hidden, teacher, 64)
    assert opened.log_beta.shape == (2, student.layers * student.kv_heads, 60)
    assert not torch.allclose(student.learn(IDS, STARTS, gates_for(student, 0.0)).hidden, teacher, atol=1e-2)


def test_decay_equals_a_bias_in_eager_attention():
    """The student against stock eager attention with the bias (t - i)·log β as a mask."""
    model = tiny_model("llama")
    student = Student(model)
    gates = gates_for(student, 1.0)
    trace = student.learn(IDS, torch.zeros_like(IDS), gates)
    student.detach()
    model.set_attn_implementation("eager")
    place = torch.arange(60)
    age = place[:, None] - place
    bias = age * trace.log_beta.detach().view(2, 2, 2, 1, 60).repeat_interleave(2, 2)
    bias = bias.masked_fill(age < 0, torch.finfo(torch.float32).min)
    for layer, attention in enumerate(m.self_attn for m in model.model.layers):
        attention.register_forward_pre_hook(
            lambda _, args, kwargs, own=bias[:, layer]: (args, kwargs | {"attention_mask": own}),
            with_kwargs=True,
        )
    with torch.no_grad():
        expected = model.model(input_ids=IDS).last_hidden_state
    assert_near(trace.hidden, expected, 64)


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_gradients_reach_all_gates_and_survive_recomputation(model, kind):
    student = Student(model)
    gates = gates_for(student, kind=kind)
    trace, expected = gradient(student, gates)
    assert all(x.abs().max() > 0 for x in expected)
    assert not any(p.grad is not None for p in model.parameters())
    student.checkpoint_layers()
    again, found = gradient(student, gates)
    assert torch.equal(again.hidden, trace.hidden)
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))


def test_bfloat16_base_keeps_gates_in_float32():
    student = Student(tiny_model("qwen3", torch.bfloat16))
    trace, found = gradient(student, gates_for(student))
    assert trace.hidden.dtype == torch.bfloat16
    assert trace.log_beta.dtype == torch.float32
    _, expected = gradient(Student(tiny_model("qwen3")), gates_for(student))
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).norm() < 0.1 * right.norm()


def test_only_global_layers_get_gates():
    student = Student(tiny_model("gemma3"))
    assert (student.layers, len(student.model.model.layers)) == (2, 4)


def test_detach_restores_the_model(model):
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        student = Student(model)
        student.checkpoint_layers()
        student.learn(IDS, STARTS, gates_for(student))
        student.detach()
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())


def test_tells_whether_documents_are_kept_apart(model):
    # a convolution runs on from one document to the next
    assert Student(model).packs == (model.config.model_type != "lfm2")


def test_refuses_models_without_a_cache_of_all_tokens():
    small = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1}
    with pytest.raises(UnsupportedModelError, match="nothing to evict"):
        Student(MambaForCausalLM(MambaConfig(**small, state_size=4)))


def test_refuses_a_model_that_gives_other_logits(monkeypatch):
    model = tiny_model("qwen3")
    monkeypatch.setattr(
        "mlx_kvret.cuda_backend.training.registry.decay_attention", lambda q, *_, **__: torch.zeros_like(q)
    )
    with pytest.raises(UnsupportedModelError, match="other logits"):
        Student(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_head_that_passes_on_other_outputs():
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        stock = model(input_ids=IDS).logits
    student = Student(model)
    hidden = student.teach(IDS, torch.zeros_like(IDS)).hidden
    assert_near(student.logits(hidden.flatten(0, 1)), stock.flatten(0, 1), 64)
