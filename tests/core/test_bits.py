"""Few bits: what may be asked for, MLX's own quantisation as the oracle, and bytes against arrays."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_kvret.core.bits import Packing, packings, parse_bits
from mlx_kvret.core.budget import CacheShape, tokens_within
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.plan import plan
from mlx_kvret.core.request import eviction
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError

QWEN3_4B = CacheShape(36, 8, 128, 128, 2, 2560)
TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
forms = st.builds(
    Packing, st.sampled_from([64, 128, 192]), st.sampled_from([4, 8]), st.sampled_from([32, 64])
)


@pytest.mark.parametrize(
    ("given_bits", "expected"),
    [
        (None, None),
        (16, None),
        ("16", None),
        (8, 8),
        ("8", 8),
        ("k8v8", 8),
        ("K8V4", "k8v4"),
        (4, 4),
        ("4", 4),
    ],
)
def test_names(given_bits, expected):
    assert parse_bits(given_bits) == expected
    assert EvictionConfig(kv_bits=given_bits).kv_bits == expected
    assert EvictionConfig.from_dict(EvictionConfig(kv_bits=given_bits).to_dict()).kv_bits == expected


@pytest.mark.parametrize("wrong", [True, False, 3, 0, -8, 8.0, "k4v8", "", "eight", [8], {}, b"8", 10**400])
def test_other_names_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"kv_bits is .*expected 8"):
        parse_bits(wrong)


def test_files_without_bits_are_as_before():
    assert "kv_bits" not in EvictionConfig().to_dict()
    assert EvictionConfig(kv_bits=4).to_dict()["kv_bits"] == 4


def test_bits_have_no_effect_where_nothing_is_kept():
    with pytest.raises(ConfigError, match="no effect with the policy 'full'"):
        EvictionConfig.create(policy="full", kv_bits=8)


def _mlx(values, form, dtype):
    """Words, scales and biases of ``mx.quantize``, and what ``mx.dequantize`` makes of them."""
    x = mx.array(values.float32()).astype(TYPES[dtype])
    words, scales, biases = mx.quantize(x, form.group, form.bits, stream=mx.cpu)
    again = mx.dequantize(words, scales, biases, form.group, form.bits, stream=mx.cpu)
    found = [np.array(a.astype(mx.float32)) for a in (scales, biases, again)]
    return np.array(words), *found


@settings(max_examples=60, deadline=None)
@given(forms, st.sampled_from(list(TYPES)), st.integers(1, 5), st.data())
def test_equal_to_mlx(form, dtype, count, data):
    # wide ranges, ties, constant groups, and zeros
    numbers = st.floats(-300, 300, width=16) | st.integers(-4, 4).map(float)
    drawn = data.draw(hnp.arrays(np.float32, (count, form.width), elements=numbers, fill=numbers))
    values = Tensor.of(drawn, dtype)
    rows = form.pack(values)
    words, scales, biases, again = _mlx(values, form, dtype)
    assert rows.dtype == np.uint32 and rows.shape == (count, form.words(values.bits.itemsize))
    np.testing.assert_array_equal(rows[:, : form.codes], words)
    pairs = form.scales(rows, dtype).float32()
    np.testing.assert_array_equal(pairs[..., 0], scales)
    np.testing.assert_array_equal(pairs[..., 1], biases)
    np.testing.assert_array_equal(form.unpack(rows, dtype).float32(), again)


@settings(max_examples=40, deadline=None)
@given(forms, st.integers(0, 2**32 - 1))
def test_no_number_is_off_by_more_than_a_step(form, seed):
    x = np.random.default_rng(seed).normal(size=(3, form.width)).astype(np.float32)
    rows = form.pack(Tensor.of(x))
    step = np.abs(form.scales(rows, "F32").float32()[..., 0])
    error = np.abs(form.unpack(rows, "F32").float32() - x).reshape(3, form.groups, form.group).max(-1)
    assert (error <= step * 1.0001 + 1e-5).all()


def test_scales_go_into_another_type():
    form = Packing(128, 8, 64)
    x = np.random.default_rng(0).normal(size=(4, 128))
    rows = form.pack(Tensor.of(x, "BF16"))
    wide = form.cast(rows, "BF16", "F32")
    assert wide.shape == (4, form.words(4))
    np.testing.assert_array_equal(form.scales(wide, "F32").float32(), form.scales(rows, "BF16").float32())
    np.testing.assert_array_equal(form.cast(wide, "F32", "BF16"), rows)
    with np.errstate(over="ignore"):
        assert not form.scales(form.cast(form.pack(Tensor.of(x * 1e30)), "F32", "F16"), "F16").finite


@pytest.mark.parametrize(("width", "group"), [(32, 32), (64, 64), (96, 32), (128, 64), (192, 64), (256, 64)])
def test_groups(width, group):
    keys, values = packings("k8v4", width, width)
    assert (keys.bits, values.bits) == (8, 4) and keys.group == values.group == group
    assert packings(None, width, width) is None


@pytest.mark.parametrize("shape", [(80, 80), (72, 128), (128, 112), (16, 16)])
def test_heads_that_do_not_divide(shape):
    with pytest.raises(UnsupportedFeatureError, match="do not divide into groups of 32"):
        packings(8, *shape)
    with pytest.raises(UnsupportedFeatureError, match="kv_bits=8 does not work"):
        eviction(CacheShape(2, 2, *shape, 2, 64), policy="recent", kv_bits=8)
    eviction(CacheShape(2, 2, *shape, 2, 64), policy="recent", kv_bits=16)


@pytest.mark.parametrize(
    ("bits", "entry", "fits"), [(None, 512, 1024), (8, 272, 1877), ("k8v4", 208, 2413), (4, 144, 3379)]
)
def test_bytes_of_a_known_model(bits, entry, fits):
    assert QWEN3_4B.kept_bytes(bits) == entry
    # kept entries alone, with their 16 bytes of accounts, in the same 156 MB
    assert 1024 * (512 + 16) // (entry + 16) == fits
    with_buffer = 36 * 8 * (1000 * (entry + 16) + 100 * (512 + 4))
    waiting = QWEN3_4B.deferred(1000, 100, bits) * 2560 * 2 * 36
    spill, ends = entry + 12, 4 * (36 * 8 + 1)
    assert QWEN3_4B.nbytes(1000, 100, bits) == with_buffer + waiting + spill + ends


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 4]), st.sampled_from([8, "k8v4", 4]), st.integers(1, 6), st.integers(1, 6))
def test_bytes_are_those_of_the_rows(itemsize, bits, key, value):
    shape = CacheShape(2, 3, 32 * key, 32 * value, itemsize, 64)
    dtype = {2: "F16", 4: "F32"}[itemsize]
    widths = shape.key_dim, shape.value_dim
    rows = [
        form.pack(Tensor.of(np.zeros((1, width)), dtype))
        for form, width in zip(packings(bits, *widths), widths, strict=True)
    ]
    assert shape.kept_bytes(bits) == sum(row.nbytes for row in rows)


@pytest.mark.parametrize("bits", [8, "k8v4", 4])
def test_a_budget_in_bytes_holds_more(bits):
    few, many = tokens_within(10**8, QWEN3_4B, None), tokens_within(10**8, QWEN3_4B, None, bits)
    assert many > 1.5 * few
    assert QWEN3_4B.nbytes(many, many // 8, bits) <= 10**8
    assert eviction(QWEN3_4B, "100MB", kv_bits=str(bits)).budget == many
    plain, packed = (plan(QWEN3_4B, 4 * 10**9, 0, 32768, 8, kv_bits=b).largest for b in (None, bits))
    assert packed.budget > 1.5 * plain.budget
