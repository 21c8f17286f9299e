"""The soft cache size: torch form and Triton kernel against the definition."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_near, assert_norm_near

from mlx_kvret.cuda_backend.kernels import soft_size as forms
from mlx_kvret.cuda_backend.kernels.soft_size import naive_soft_size, soft_size
from training.attention_terms import soft_size_terms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_triton_kernel runs it in its own process")
either_form = pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=interpreted)])


@pytest.mark.skipif(INTERPRETED, reason="the kernel's tests run in this process")
def test_triton_kernel():
    """The tests of the kernel in a process whose triton interprets from the start."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "True", "--noconftest"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert f"{len(CASES) + 1} passed" in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mlx_kvret.cuda_backend.kernels import soft_size_triton as kernels

    for kernel in (kernels.soft_size_fwd_kernel, kernels.soft_size_bwd_kernel):
        pointers = {name: "*fp32" for name in kernel.arg_names if name.startswith("p_")}
        integers = {"p_starts": "*i32", "p_stops": "*i32", "heads": "i32", "tokens": "i32"}
        integers = {name: kind for name, kind in integers.items() if name in kernel.arg_names}
        source = ASTSource(kernel, pointers | integers | {"BLOCK": "constexpr"}, {"BLOCK": kernels.BLOCK})
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def inputs(batch, heads, tokens, cuts=()):
    make = torch.Generator().manual_seed(tokens)
    log_beta = torch.nn.functional.logsigmoid(4 * torch.randn(batch, heads, tokens, generator=make) + 4)
    starts = torch.zeros(batch, tokens, dtype=torch.long)
    for cut in cuts:
        starts[-1, cut:] = cut
    return log_beta.requires_grad_(), starts


CASES = [(2, 2, 130, (17, 100)), (1, 1, 1, ()), (1, 1, 64, (63,)), (1, 1, 65, (1, 64))]


@pytest.mark.parametrize("batch, heads, tokens, cuts", CASES)
@either_form
def test_value_and_gradient_equal_naive(kernel, batch, heads, tokens, cuts):
    log_beta, starts = inputs(batch, heads, tokens, cuts)
    weight = torch.randn(log_beta.shape, generator=torch.Generator().manual_seed(0))
    found, expected = soft_size(log_beta, starts, kernel), naive_soft_size(log_beta.double(), starts)
    terms = soft_size_terms(log_beta.detach(), starts, weight)
    assert_near(found, expected, 16, terms[0])
    (mine,) = torch.autograd.grad((found * weight).sum(), log_beta)
    (right,) = torch.autograd.grad((expected * weight).sum(), log_beta)
    assert_norm_near(mine, right, 1e-5, terms[1])


def test_blocks_of_the_torch_form(monkeypatch):
    log_beta, starts = inputs(2, 3, 50, (20,))
    whole = soft_size(log_beta, starts)
    monkeypatch.setattr(forms, "BLOCK_ELEMENTS", 7 * 2 * 3 * 50)
    assert_near(soft_size(log_beta, starts), whole, 16, whole)


@either_form
def test_strided_input_and_expanded_gradient(kernel):
    log_beta, starts = inputs(1, 40, 6)
    turned = log_beta.detach().transpose(1, 2).requires_grad_()
    starts = torch.zeros(1, 40, dtype=torch.long)
    found = soft_size(turned, starts, kernel)
    terms = soft_size_terms(turned.detach(), starts, torch.ones_like(found))
    assert_near(found, naive_soft_size(turned, starts), 16, terms[0])
    found.sum().backward()
    (right,) = torch.autograd.grad(naive_soft_size(turned, starts).sum(), turned)
    assert_near(turned.grad, right, 16, terms[1])


@given(st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=40), st.integers(0, 39))
@settings(max_examples=60, deadline=None)
def test_between_one_and_all(values, cut):
    log_beta = torch.tensor(values)[None, None]
    starts = torch.zeros(1, len(values), dtype=torch.long)
    starts[0, cut:] = cut
    counted = torch.arange(len(values)) - starts + 1
    size = forms.forward_torch(log_beta, starts)
    assert (size >= 1 - 1e-6).all()
    assert (size <= counted + 1e-4).all()
    kept = forms.forward_torch(torch.zeros_like(log_beta), starts)
    assert torch.equal(kept, counted[None].float())
