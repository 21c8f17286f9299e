"""Gemma 4 on MLX: inside a picture attention looks both ways, in any pass and turn, whatever was evicted."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvret

from . import tiny_mlx as tiny

CLOSE = 2e-6


@pytest.fixture(scope="module")
def model():
    made = tiny.build("gemma4")
    made.language_model.config.use_bidirectional_attention = "vision"
    assert made.language_model.model.config is made.language_model.config
    return made


def typed(model, seed, *sizes):
    """A turn whose tokens' types are told, as Gemma's processor does."""
    ids, embeds, rest = tiny.turn("gemma4", model, seed, *sizes)
    return ids, embeds, rest | {"mm_token_type_ids": (ids == tiny.IMAGE).astype(mx.int32)}


def test_one_pass_is_the_models_own_and_differs_from_a_causal_one(model):
    lm = model.language_model
    turn = typed(model, 1, (3, 4), (2, 2))
    ids, embeds, rest = turn
    own = lm(ids, inputs_embeds=embeds, cache=tiny.stock_cache(lm), **rest).logits
    causal = lm(
        ids, inputs_embeds=embeds, cache=tiny.stock_cache(lm), per_layer_inputs=rest["per_layer_inputs"]
    ).logits
    assert tiny.apart(own, causal) > 0.01
    mlx_kvret.attach(model, None)
    try:
        cache = mlx_kvret.make_cache(model, budget=4096, policy="recent")
        assert tiny.apart(lm(ids, inputs_embeds=embeds, cache=cache, **rest).logits, own) < CLOSE
        assert vars(lm.model).get("_apply_blockwise_bidirectional_overlay") is None
    finally:
        mlx_kvret.detach(model)


@pytest.mark.parametrize("budget", [4096, 6])
def test_pictures_in_later_passes_look_both_ways_too(model, budget):
    """Two turns, of which the stock model sees the second causally, against one pass masked by hand."""
    lm = model.language_model
    first, second = typed(model, 1, (2, 2)), typed(model, 2, (3, 4))
    mlx_kvret.attach(model, None)
    try:
        cache = mlx_kvret.make_cache(model, budget=budget, buffer=2, policy="random", scope="global")
        lm(first[0], inputs_embeds=first[1], cache=cache, **first[2])
        kept = cache.kept_positions()
        found = lm(second[0], inputs_embeds=second[1], cache=cache, **second[2]).logits
    finally:
        mlx_kvret.detach(model)
    n, total = first[0].shape[1], first[0].shape[1] + second[0].shape[1]
    ids = mx.concatenate([first[0], second[0]], axis=1)
    block = np.zeros((total, total), bool)
    for a, b in ((6, 10), (n + 6, n + 18)):
        block[a:b, a:b] = True
    causal = np.tril(np.ones((total, total), bool))
    window = causal & (np.arange(total)[:, None] - np.arange(total) < 24)
    competing = [i for i, one in enumerate(lm.config.layer_types) if one == "full_attention"]
    masks = []
    for layer, kind in enumerate(lm.config.layer_types):
        if kind == "sliding_attention":
            masks.append(mx.array(window | block)[None, None])
            continue
        seen = np.repeat((causal | block)[None], 4, 0)
        for head, positions in enumerate(kept[competing.index(layer)]):
            seen[2 * head : 2 * head + 2, n:, :n] = np.isin(np.arange(n), positions)
        masks.append(mx.array(seen)[None])
    stock = type(lm.model)._make_masks
    type(lm.model)._make_masks = lambda self, *args: masks
    try:
        embeds = mx.concatenate([first[1], second[1]], axis=1)
        words = mx.concatenate([one[2]["per_layer_inputs"] for one in (first, second)], axis=1)
        whole = lm(ids, inputs_embeds=embeds, per_layer_inputs=words, cache=tiny.stock_cache(lm)).logits
    finally:
        type(lm.model)._make_masks = stock
    # in one pass and in two the model itself rounds 1.5e-6 apart; a picture seen one way is off by .7
    assert tiny.apart(found, whole[:, n:]) < 1e-5
