"""Attaching and detaching: what is refused by name, and that nothing is left behind."""

import copy
import gc
import importlib
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.tuner.utils import linear_to_lora_layers
from rounding import assert_near
from tiny import ARCHITECTURES, COMMON, forward, gated, pieces, prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret.errors import ModelMismatchError, UnsupportedModelError
from mlx_kvret.mlx_backend import hooks

STATE_SPACE = {
    "state_size": 8, "conv_kernel": 3, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2,
}  # fmt: skip
INDEXED = {
    "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
}  # fmt: skip
REFUSED = {
    "gemma2": {},
    "plamo2": {"mamba_num_heads": 4, "hidden_size_per_head": 8},
    "iquestloopcoder": {},
    "deepseek_v32": INDEXED,
    "mamba": STATE_SPACE,
    "smollm3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
}


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("name,changes", REFUSED.items(), ids=REFUSED)
def test_refused_by_name_and_left_as_it_was(name, changes):
    model = tiny(name, **changes)
    module = sys.modules[type(model).__module__]
    before = classes(model), getattr(module, hooks.ATTENTION, None)
    with pytest.raises(UnsupportedModelError, match=f"^{name} models"):
        mlx_kvret.attach(model)
    assert (classes(model), getattr(module, hooks.ATTENTION, None)) == before
    assert hooks.attachment(model) is None


@pytest.mark.parametrize("name", hooks.REFUSED)
def test_every_refused_name_is_one_of_mlx_lm_s(name):
    assert importlib.util.find_spec(f"mlx_lm.models.{name}")


def test_refused_by_name_whatever_it_looks_like():
    for name in hooks.REFUSED:
        model = tiny(model_type=name)
        with pytest.raises(UnsupportedModelError, match=f"^{name} models cannot be bounded: it"):
            mlx_kvret.attach(model)


class Softcapped(nn.Module):
    """An attention that mlx-lm does not have: it changes cached keys before it attends."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def __call__(self, x, mask=None, cache=None):
        keys = mx.zeros((1, 2, x.shape[1], 8))
        keys, values = cache.update_and_fetch(keys, keys)
        out = scaled_dot_product_attention(
            mx.zeros((1, 4, x.shape[1], 8)), keys * 2, values, cache=cache, scale=1.0, mask=mask
        )
        return x + out.sum()


def test_an_unknown_attention_that_changes_cached_keys_is_refused():
    model = tiny()
    for layer in model.layers:
        layer.self_attn = Softcapped(layer.self_attn)
    with pytest.raises(UnsupportedModelError, match="qwen3 models cannot be bounded"):
        mlx_kvret.attach(model)
    assert scaled_dot_product_attention.__module__ == "mlx_lm.models.base"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_detaching_restores_everything(name):
    gc.collect()
    model = tiny(name)
    modules = {sys.modules[cls.__module__] for cls in classes(model) if callable(cls)}
    before = classes(model), {m: dict(vars(m)) for m in modules}, dict(model.__dict__)
    weights = [key for key, _ in tree_flatten(model.parameters())]
    stock = forward(model, prompt(9), mlx_cache.make_prompt_cache(model))

    mlx_kvret.attach(model)
    assert [key for key, _ in tree_flatten(model.parameters())] == weights
    assert classes(model) != before[0]
    assert mlx_kvret.detach(model) is model
    assert (classes(model), {m: dict(vars(m)) for m in modules}, dict(model.__dict__)) == before
    cache = mlx_cache.make_prompt_cache(model)
    assert not hasattr(cache, "shared")
    np.testing.assert_array_equal(forward(model, prompt(9), cache), stock)
    assert mlx_kvret.detach(model) is model


def test_the_dispatcher_stays_for_the_last_attached_model():
    gc.collect()  # no other test holds a model of this file
    module = importlib.import_module("mlx_lm.models.olmo2")
    stock = module.scaled_dot_product_attention
    one, other = gated("olmo2"), gated("olmo2", seed=1)
    cache = mlx_kvret.make_cache(other, budget=8, buffer=2)
    forward(other, prompt(30), cache)
    mlx_kvret.detach(one)
    expected = forward(other, [1], copy.deepcopy(cache))
    twin = copy.deepcopy(other)
    mlx_kvret.detach(other)
    assert module.scaled_dot_product_attention is stock
    # a copy of an attached model hooks the module again when it is used
    np.testing.assert_array_equal(forward(twin, [1], cache), expected)
    assert module.scaled_dot_product_attention is not stock
    mlx_kvret.detach(twin)
    assert module.scaled_dot_product_attention is stock


def test_the_dispatcher_is_inert_for_stock_caches():
    gated()
    model = tiny()
    cache = mlx_cache.make_prompt_cache(model)
    chunks = [forward(model, part, cache) for part in pieces(prompt(20), [7, 1])]
    assert_near(np.concatenate(chunks), model(mx.array([prompt(20)]))[0], 64)


@pytest.mark.parametrize("first", [True, False])
def test_quantising_before_and_after(first):
    model = tiny(hidden_size=64, intermediate_size=64)
    gates = random_gates(shape_of(mlx_kvret.attach(model)))
    mlx_kvret.detach(model)
    if first:
        nn.quantize(model, group_size=32, bits=8)
    mlx_kvret.attach(model, gates)
    if not first:
        nn.quantize(model, group_size=32, bits=8)
    bounded = forward(model, prompt(30), mlx_kvret.make_cache(model, budget=40))
    mlx_kvret.detach(model)
    stock = forward(model, prompt(30), mlx_cache.make_prompt_cache(model))
    assert_near(bounded, stock, 64)
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)


def test_lora_on_an_attached_model():
    model = gated()
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    assert type(model.layers[0].self_attn.q_proj).__name__ == "LoRALinear"
    cache = mlx_kvret.make_cache(model, budget=8, buffer=2)
    forward(model, prompt(30), cache)
    assert cache.entries == 8 * 4
    mlx_kvret.detach(model)
    assert "lora_a" in dict(model.layers[0].self_attn.q_proj)


def test_weights_load_strictly_and_save_under_their_own_names(tmp_path):
    model = gated()
    model.save_weights(str(tmp_path / "w.safetensors"))
    tiny(seed=1).load_weights(str(tmp_path / "w.safetensors"), strict=True)
    model.load_weights(str(tmp_path / "w.safetensors"), strict=True)


def test_gates_of_another_model_are_refused_and_the_model_stays_attached():
    model = gated()
    shape = shape_of(model)
    for wrong, changes in (
        ("3 layers", {"num_hidden_layers": 3}),
        ("KV heads 1", {"num_key_value_heads": 1}),
        ("hidden_size is 16", {"hidden_size": 16}),
    ):
        other = shape_of(mlx_kvret.attach(tiny(**changes)))
        with pytest.raises(ModelMismatchError, match=wrong):
            mlx_kvret.attach(model, random_gates(other))
        assert hooks.attachment(model).gates is not None and shape_of(model) == shape


def test_gates_for_all_layers_serve_those_that_compete():
    model = mlx_kvret.attach(tiny("gemma3_text"))
    gates = random_gates(shape_of(model), layers=4, shared=False)
    mlx_kvret.attach(model, gates)
    cache = mlx_kvret.make_cache(model, budget=6, buffer=2)
    assert list(cache.shared.arena.gate_layers) == [1, 3]
    forward(model, prompt(30), cache)
    assert cache.entries == 6 * 4


def test_rg_gates_and_separate_projections():
    for options in ({"kind": "rg"}, {"kind": "rg", "shared": False}, {"shared": False}):
        model = gated(gates=options)
        cache = mlx_kvret.make_cache(model, budget=6, buffer=2)
        forward(model, prompt(30), cache)
        assert cache.entries == 6 * 4
    assert COMMON["num_hidden_layers"] == 2
