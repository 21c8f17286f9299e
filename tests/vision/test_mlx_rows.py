"""Rows of mlx-vlm's models in one batch: logits, positions and entries are those of each row alone."""

import mlx.core as mx
import pytest

import mlx_kvret
from mlx_kvret.errors import OutOfMemoryError, UnsupportedFeatureError
from mlx_kvret.mlx_backend import batching, hooks
from mlx_kvret.mlx_backend.cache import BoundedCache

from . import tiny_mlx as tiny

TALKS = ((1, (3, 4)), (2,), (3, (2, 2), (4, 2)))
SAID = [3, 14, 15, 9, 2]


@pytest.mark.parametrize("name", tiny.RIGHT)
def test_rows_decode_together_as_each_does_alone(name):
    model = tiny.build(name)
    lm = model.language_model
    mlx_kvret.attach(model, None)
    talks = [tiny.turn(name, model, *one) for one in TALKS]
    budgets = 8, 12, 9

    def read():
        caches = [mlx_kvret.make_cache(model, budget=b, buffer=2, policy="keydiff") for b in budgets]
        for talk, cache in zip(talks, caches, strict=True):
            tiny.passes(lm, talk, cache, 7)
        return caches

    alone = read()
    expected = [tiny.tokens(lm, SAID, cache) for cache in alone]
    batch, *others = read()
    for one in others:
        batch.extend(one)
    found = []
    for step, token in enumerate(SAID):
        if step == 3:
            # the middle row leaves, and what it has read alone goes on in it
            single = batch.row(1)
            batch.filter([0, 2])
            assert tiny.apart(tiny.tokens(lm, SAID[3:], single), expected[1][3:]) < 5e-6
        found.append(lm(mx.array([[token]] * batch.rows), cache=batch).logits[:, -1])
    for row, (at, cache) in enumerate(((0, alone[0]), (2, alone[2]))):
        own = mx.stack([one[at if len(one) == 3 else row] for one in found])
        assert tiny.apart(own, expected[at]) < 5e-6
        left = batch.row(row)
        assert left.pictures == cache.pictures and left.seen == cache.seen
        for ours, theirs in zip(left.kept_positions(), cache.kept_positions(), strict=True):
            assert [a.tolist() for a in ours] == [b.tolist() for b in theirs]
    assert hooks.rows_agree(model)


def test_memory_that_is_short_says_nothing_of_a_model(monkeypatch):
    model = tiny.build("qwen2_5_vl")
    mlx_kvret.attach(model, None)

    def short(*given):
        raise OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(BoundedCache, "extend", short)
        with pytest.raises(OutOfMemoryError):
            hooks.rows_agree(model)
    assert hooks.rows_agree(model)


def test_prompts_of_text_are_read_together(monkeypatch):
    model = tiny.build("qwen2_5_vl")
    lm = model.language_model
    mlx_kvret.attach(model, None)
    talks = [tiny.turn("qwen2_5_vl", model, *one) for one in TALKS]
    prompts = [[5, 6, 7, 8], [9], [11, 12]]
    caches = [mlx_kvret.make_cache(model, budget=64, policy="recent") for _ in talks]
    for talk, cache in zip(talks, caches, strict=True):
        tiny.passes(lm, talk, cache)
    expected = [tiny.tokens(lm, ids, cache.copy())[-1] for ids, cache in zip(prompts, caches, strict=True)]
    batch, *others = (cache.copy() for cache in caches)
    for one in others:
        batch.extend(one)
    batch.prepare([4, 1, 2])
    ids = mx.array([[*ids, *[0] * (4 - len(ids))] for ids in prompts])
    out = lm(ids, cache=batch).logits
    for row, own in enumerate(prompts):
        assert tiny.apart(out[row, len(own) - 1], expected[row]) < 2e-6
    batch.finalize()
    for given in ({"inputs_embeds": mx.zeros((3, 2, 64))}, {"position_ids": mx.zeros((3, 3, 2), mx.int32)}):
        with pytest.raises(UnsupportedFeatureError, match="read its pictures alone"):
            lm(mx.array([[1, 2]] * 3), cache=batch, **given)
    assert [batch.row(row).seen for row in range(3)] == [
        cache.seen + len(ids) for cache, ids in zip(caches, prompts, strict=True)
    ]


def test_a_model_that_counts_rows_alike_is_found_out(monkeypatch):
    model = tiny.build("llava")
    mlx_kvret.attach(model, None)
    assert batching.BatchGenerator(model)
    # as if its own code took the longest row's position for all
    hooks.attachment(model).rows = None
    from mlx_kvret.mlx_backend.entry import BoundedKVCache

    monkeypatch.setattr(BoundedKVCache, "offset", property(lambda entry: entry.size()))
    with pytest.raises(UnsupportedFeatureError, match="batches do not work with this llava model"):
        batching.BatchGenerator(model)
