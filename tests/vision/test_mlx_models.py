"""Tiny models of mlx-vlm with pictures: right logits by both oracles, whatever turns, chunks and caches."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvret
from mlx_kvret.errors import UnsupportedModelError

from . import tiny_mlx as tiny

TALK = ((1, (3, 4)), (2,), (3, (2, 2), (4, 2)))
ANSWER = [3, 14, 15, 9, 2]
# cutting a text in other chunks changes qwen3_5's own logits by 2.3e-6: its recurrence carries rounding along
CLOSE = dict.fromkeys(tiny.RIGHT, 2e-6) | {"qwen3_5": 5e-6}


class Conversation:
    """Turns of a conversation, each embedded alone, and what a stock model is given to read all of it."""

    def __init__(self, name, model, turns=None):
        self.name, self.model, self.lm = name, model, model.language_model
        self.turns = turns or [tiny.turn(name, model, *one) for one in TALK]
        ids = [turn[0] for turn in self.turns]
        self.ids = mx.concatenate([part for one in ids for part in (one, mx.array([ANSWER]))], axis=1)
        self.positions = None
        if name in tiny.M_ROPE:
            grids = [turn[2]["image_grid_thw"] for turn in self.turns if "image_grid_thw" in turn[2]]
            self.positions = self.lm.get_rope_index(self.ids, mx.concatenate(grids))[0]

    def bounded(self, cache, chunk=7, before=None):
        """Logits at the end of every pass into a bounded cache, made as mlx-vlm's loop makes them."""
        found = []
        for turn in self.turns:
            found.append(tiny.passes(self.lm, turn, cache, chunk, before))
            found.append(tiny.tokens(self.lm, ANSWER, cache, before))
        return mx.concatenate(found)

    def stock(self, cache, chunk=7, before=None):
        """The same passes of the model itself, told the position of every token and its own pictures only."""
        found, seen = [], 0
        for ids, embeds, rest in self.turns:
            marked = np.flatnonzero(np.array(ids[0] == tiny.IMAGE))
            at = 0
            while at < ids.shape[1]:
                end = at + min(chunk, max(1, ids.shape[1] - at - 1))
                if before is not None:
                    before(cache)
                own = self._positions(seen + at, seen + end)
                if rest.get("deepstack_visual_embeds") is not None:
                    a, b = np.searchsorted(marked, [at, end])
                    if a < b:
                        own["visual_pos_masks"] = rest["visual_pos_masks"][:, at:end]
                        own["deepstack_visual_embeds"] = [f[a:b] for f in rest["deepstack_visual_embeds"]]
                if "per_layer_inputs" in rest:
                    own["per_layer_inputs"] = rest["per_layer_inputs"][:, at:end]
                out = self.lm(ids[:, at:end], inputs_embeds=embeds[:, at:end], cache=cache, **own)
                found.append(out.logits[:, -1])
                at = end
            seen += ids.shape[1]
            for token in ANSWER:
                if before is not None:
                    before(cache)
                out = self.lm(mx.array([[token]]), cache=cache, **self._positions(seen, seen + 1))
                found.append(out.logits[:, -1])
                seen += 1
        return mx.concatenate(found)

    def dense(self, kept):
        """The same of the model itself, whose attention is over what was ``kept`` at each pass."""
        plain = tiny.stock_cache(self.lm)
        with tiny.masked(self.lm, plain, kept) as state:

            def count(_):
                state["pass"] += 1

            return self.stock(plain, before=count)

    def _positions(self, start, end):
        return {} if self.positions is None else {"position_ids": self.positions[..., start:end]}


@pytest.fixture(scope="module", params=tiny.RIGHT)
def talk(request):
    model = tiny.build(request.param)
    return Conversation(request.param, model)


def test_logits_are_the_models_own_while_everything_fits(talk):
    expected = talk.stock(tiny.stock_cache(talk.lm))
    state = [getattr(talk.lm, name, None) for name in ("_position_ids", "_rope_deltas")]
    mlx_kvret.attach(talk.model, None)
    try:
        assert [getattr(talk.lm, name, None) for name in ("_position_ids", "_rope_deltas")] == state
        one, other = (mlx_kvret.make_cache(talk.model, budget=4096, policy="recent") for _ in range(2))
        full = mlx_kvret.make_cache(talk.model, policy="full")
        # another conversation in between every two passes
        foreign = tiny.turn(talk.name, talk.model, 9, (5, 2))

        def disturb(_):
            tiny.passes(talk.lm, foreign, other, 50)

        assert tiny.apart(talk.bounded(one, before=disturb), expected) < CLOSE[talk.name]
        assert tiny.apart(talk.bounded(full), expected) < CLOSE[talk.name]
        assert one.seen == full.seen == talk.ids.shape[1] and one.pictures == full.pictures
        assert [p.tokens for p in one.pictures] == [12, 4, 8]
        if talk.positions is not None:
            assert [(p.rows, p.columns, p.advance) for p in one.pictures] == [(3, 4, 4), (2, 2, 2), (4, 2, 4)]
        marked = np.flatnonzero(np.array(talk.ids[0] == tiny.IMAGE))
        seen = one.kept_positions(modality="picture")[0][0]
        assert seen.tolist() == marked.tolist()
    finally:
        mlx_kvret.detach(talk.model)
    assert tiny.apart(talk.stock(tiny.stock_cache(talk.lm)), expected) == 0


@pytest.mark.parametrize(("policy", "scope"), [("random", "global"), ("keydiff", "modality")])
def test_logits_are_those_of_dense_attention_over_what_was_kept(talk, policy, scope):
    kept = []
    mlx_kvret.attach(talk.model, None)
    try:
        cache = mlx_kvret.make_cache(talk.model, budget=8, buffer=2, policy=policy, scope=scope)
        found = talk.bounded(cache, before=lambda c: kept.append(c.kept_positions()))
        lengths = [len(head) for layer in cache.kept_positions() for head in layer]
        assert cache.entries == sum(lengths) <= 10 * len(lengths) < talk.ids.shape[1] * len(lengths)
    finally:
        mlx_kvret.detach(talk.model)
    assert tiny.apart(found, talk.dense(kept)) < CLOSE[talk.name]


@pytest.mark.parametrize("name", ["paligemma", "mllama"])
def test_models_that_would_answer_wrongly_are_refused_by_name(name):
    model = tiny.build(name)
    for part in (model, model.language_model):
        with pytest.raises(UnsupportedModelError, match=f"{name} models cannot be bounded: "):
            mlx_kvret.attach(part, None)


@pytest.mark.parametrize("name", ["paligemma", "mllama", "phi3_v"])
def test_their_folders_are_refused_before_anything_is_read(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "vision_config": {"depth": 1}}))
    with pytest.raises(UnsupportedModelError, match=f"{name} models cannot be bounded: "):
        mlx_kvret.load(tmp_path, None, backend="mlx")
