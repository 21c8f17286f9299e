"""RoPE settings as numbers against transformers' own, and what is refused."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_kvret.core.rope import Rope
from mlx_kvret.errors import ConfigError, UnsupportedModelError
from mlx_kvret.mlx_backend.rotation import FixedRoPE, applies

from .families import KINDS

HEAD, MOST = 8, 8192
SCALED = {
    **{name: kind for name, kind in KINDS.items() if "rope_type" in kind},
    "yarn, two scales": KINDS["yarn"] | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_slow": 2.0},
    "longrope, own scale": KINDS["longrope"] | {"attention_factor": 1.3},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
}


def rope(kind: dict, theta: float = 5e4) -> Rope:
    return Rope("llama", {"rope_theta": theta} | kind, HEAD, MOST)


@pytest.mark.parametrize("length", [None, 10, 100_000])
@pytest.mark.parametrize("kind", SCALED.values(), ids=SCALED)
def test_the_numbers_are_transformers_own(kind, length):
    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_attention_heads=4, head_dim=HEAD, max_position_embeddings=MOST,
        rope_parameters={"rope_theta": 5e4} | kind,
    )  # fmt: skip
    expected, scale = ROPE_INIT_FUNCTIONS[kind["rope_type"]](config, seq_len=length or MOST)
    found = rope(kind).rotation(length=length)
    np.testing.assert_allclose(found.frequencies, expected.numpy(), rtol=2e-6)
    assert found.scale == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("kind", SCALED.values(), ids=SCALED)
def test_a_module_is_measured(kind, traditional):
    wanted = rope(kind).rotation(length=MOST)
    assert applies(FixedRoPE(wanted, traditional), wanted, HEAD)
    for wrong in (rope(kind, theta=5.1e4), rope(kind | {"factor": 5.0})):
        if (other := wrong.rotation(length=MOST)) is not None and not same(other, wanted):
            assert not applies(FixedRoPE(other, traditional), wanted, HEAD)


def same(a, b):
    return np.allclose(a.frequencies, b.frequencies, rtol=1e-6) and a.scale == pytest.approx(b.scale)


def test_what_a_module_does_to_the_rest_of_a_head_and_to_far_positions_counts():
    wanted = rope({}).rotation()
    assert applies(nn.RoPE(HEAD, base=5e4), wanted, 2 * HEAD)
    assert not applies(nn.RoPE(2 * HEAD, base=5e4), wanted, 2 * HEAD)
    settings = {"rope_type": "dynamic", "factor": 4.0}
    dynamic = initialize_rope(HEAD, 5e4, False, settings, MOST)
    assert not applies(dynamic, rope(settings).rotation(), HEAD)

    class Skewed(nn.RoPE):
        def __call__(self, x, offset=0):
            return super().__call__(x, offset=offset) + 1e-3 * mx.sum(x, -1, keepdims=True)

    assert not applies(Skewed(HEAD, base=5e4), wanted, HEAD)
    assert not applies(nn.Linear(HEAD, HEAD), wanted, HEAD)


@pytest.mark.parametrize(
    "kind,found",
    [
        ({"sharpness": 3.0}, "llama models with the RoPE setting sharpness = 3.0"),
        ({"factor": 4.0}, "RoPE setting factor = 4.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_type": "spiral"}, "rope_type 'spiral'"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(kind, found):
    with pytest.raises(UnsupportedModelError, match=found):
        rope(kind).check_keys(())
    rope({"partial_rotary_factor": 1.0, "sharpness": None}).check_keys(())


@pytest.mark.parametrize(
    "kind",
    [{"rope_type": "linear"}, KINDS["linear"] | {"factor": "4"}, KINDS["longrope"] | {"long_factor": [1]}],
)
def test_missing_and_wrong_numbers_are_refused(kind):
    with pytest.raises(UnsupportedModelError, match="llama model is"):
        rope(kind).rotation()


def test_the_length_to_which_frequencies_are_fixed():
    assert rope(KINDS["yarn"]).fixed_length(None) is None
    with pytest.raises(ConfigError, match="rope_length has no effect on llama models"):
        rope(KINDS["yarn"]).fixed_length(100)
    longrope = rope(KINDS["longrope"])
    assert [longrope.fixed_length(n) for n in (None, 16, 17, 10**6)] == [MOST, 16, MOST, MOST]
    with pytest.raises(UnsupportedModelError, match="load with rope_length=N"):
        rope(KINDS["dynamic"]).fixed_length(None)
    assert [rope(KINDS["dynamic"]).fixed_length(n) for n in (5, 10_000)] == [MOST, 10_000]
