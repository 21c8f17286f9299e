"""Fading attention against its naive twin."""

import pytest
import torch
from rounding import assert_near, assert_norm_near
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import causal_mask_function, or_masks, sliding_window_causal_mask_function

from mlx_kvret.cuda_backend.training.attention import (
    PackedMask,
    _block,
    decay_attention,
    naive_decay_attention,
    pieces,
)
from mlx_kvret.cuda_backend.training.registry import _BlockMask
from training.attention_terms import attention_terms

SCALE = 0.3


def tensors(groups=3, tokens=50, size=16, value=24, dtype=torch.float32, heads=2):
    make = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=make)

    query, key, values = (
        random(2, heads * groups, tokens, size),
        random(2, heads, tokens, size),
        random(2, heads, tokens, value),
    )
    log_beta = torch.nn.functional.logsigmoid(3 * random(2, tokens, heads) + 2)
    return [x.to(dtype).requires_grad_() for x in (query, key, values)] + [log_beta.requires_grad_()]


def packed(tokens):
    """One row of a single document, one of three."""
    starts = torch.zeros(2, tokens, dtype=torch.long)
    for begin in (tokens // 3, tokens // 2 + 1):
        starts[1, begin:] = begin
    return PackedMask(starts)


def outcome(function, inputs, *options):
    """Output and gradients under a random loss."""
    out = function(*inputs, *options).float()
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return [out.detach()] + [x.grad.float() for x in inputs]


def with_pictures(tokens):
    """The same rows, with pictures that are seen whole."""
    ends = torch.arange(1, tokens + 1).repeat(2, 1)
    for row, first, last in ((0, 3, 12), (0, 20, tokens), (1, tokens // 3, tokens // 3 + 5), (1, 0, 2)):
        ends[row, first:last] = last
    return PackedMask(packed(tokens).starts, ends)


def compare(inputs, tokens, rows, tolerance, sinks=None, mask=None):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = mask or packed(tokens)
    found = outcome(decay_attention, inputs, mask, SCALE, rows, sinks)
    expected = outcome(naive_decay_attention, exact, mask, SCALE, sinks)
    given = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(2))
    sizes = attention_terms([x.detach() for x in exact], mask.starts, SCALE, given, sinks, ends=mask.ends)
    for mine, right, size in zip(found, expected, sizes, strict=True):
        assert_norm_near(mine, right, tolerance, size)


@pytest.mark.parametrize("rows", [4, 21, 2048])
@pytest.mark.parametrize("tokens, groups, size, value", [(50, 3, 16, 24), (63, 1, 7, 5), (1, 2, 8, 8)])
def test_equals_naive(tokens, groups, size, value, rows):
    compare(tensors(groups, tokens, size, value), tokens, rows, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_sinks(dtype, tolerance):
    compare(tensors(dtype=dtype), 50, 33, tolerance, torch.linspace(-3, 5, 6))


@pytest.mark.parametrize("rows", [4, 21, 2048])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_later_tokens_of_a_picture_have_not_faded(dtype, tolerance, rows):
    compare(tensors(dtype=dtype), 50, rows, tolerance, torch.linspace(-3, 5, 6), with_pictures(50))
    query, key, value, _ = tensors(dtype=torch.float32)
    plain = decay_attention(query, key, value, None, with_pictures(50), SCALE, rows)
    assert_near(plain, naive_decay_attention(query, key, value, None, with_pictures(50), SCALE), 32)
    gone = torch.full((2, 50, 2), -1e4)
    out = decay_attention(query, key, value, gone, with_pictures(50), SCALE, rows)
    alone = torch.softmax(SCALE * query[0, 0, 3] @ key[0, 0, 3:12].T, -1) @ value[0, 0, 3:12]
    assert_near(out[0, 0, 3], alone, 32)


@pytest.mark.parametrize("window", [None, 7])
def test_a_block_takes_the_keys_that_it_sees_and_no_others(window):
    ends = torch.arange(1, 51)[None]
    ends[0, 20:33] = 33
    starts = torch.tensor([0] * 18 + [18] * 32)[None]
    causal = sliding_window_causal_mask_function(window) if window else causal_mask_function
    both_ways = or_masks(causal, lambda row, head, query, key: ends[row, query] == ends[row, key])
    mask = _BlockMask({"batch_size": 1, "mask_function": both_ways}, PackedMask(starts, ends), window)
    for at in range(50):
        query = range(at, at + 1)
        seen = mask.block(query, range(50)).flatten().nonzero()
        assert (mask.first_key(query), mask.last_key(query)) == (seen[0], seen[-1] + 1)


def test_bfloat16_carries_float32_columns():
    compare(tensors(dtype=torch.bfloat16), 50, 33, 0.01)


def test_float16_is_computed_in_float32():
    compare(tensors(dtype=torch.float16), 50, 33, 1e-3)


def test_without_gates_it_is_plain_attention():
    query, key, value, log_beta = tensors()
    plain = decay_attention(query, key, value, None, packed(50), SCALE, 16)
    kept = decay_attention(query, key, value, torch.zeros_like(log_beta), packed(50), SCALE, 16)
    assert_near(plain, naive_decay_attention(query, key, value, None, packed(50), SCALE), 32)
    assert_near(plain, kept, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_hold_float32(dtype):
    x = torch.randn(1000) * torch.logspace(-6, 4, 1000)
    assert ((sum(piece.double() for piece in pieces(x, dtype)) - x).abs() <= 2e-7 * x.abs()).all()
    ages = torch.arange(2048.0)
    assert torch.equal(sum(piece.float() for piece in pieces(ages, dtype, 2048)), ages)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-3)])
def test_exact_at_128k_tokens(dtype, tolerance):
    """Late queries with quickly decaying entries, where t·log β loses what (t - i)·log β needs."""
    tokens, block = 1 << 17, range((1 << 17) - 64, 1 << 17)
    query, key, value = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, tokens, 4), torch.randn(1, 1, tokens, 4)
    log_beta = -torch.rand(1, tokens, 1) * 3
    mask = PackedMask(torch.zeros(1, tokens, dtype=torch.long))
    out = _block(query.to(dtype), key.to(dtype), value.to(dtype), log_beta, mask, block, SCALE)
    age = torch.arange(block.start, block.stop)[:, None] - torch.arange(tokens)
    logits = (age * log_beta[0, :, 0].double()).masked_fill(age < 0, -torch.inf)
    expected = logits.softmax(-1) @ value[0, 0].to(dtype).double()
    assert (out[0, 0].double() - expected).abs().max() < tolerance


def test_runs_on_a_fused_kernel():
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        for dtype in (torch.float32, torch.bfloat16):
            outcome(decay_attention, tensors(dtype=dtype), packed(50), SCALE, 16)


def test_memory_of_the_backward_pass_is_linear():
    saved = {}
    for tokens in (512, 1024, 2048):
        inputs, mask = tensors(1, tokens, 4, 4), packed(tokens)
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            decay_attention(*inputs, mask, SCALE, 64)
        saved[tokens] = sum(sizes.values())
    assert saved[2048] - saved[1024] <= 2.1 * (saved[1024] - saved[512])
