"""mlx-vlm's families from a folder, with their own processor and tower: both oracles, and stock's words."""

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest

import mlx_kvret
from mlx_kvret.core.picture_prompts import asked
from mlx_kvret.errors import UnsupportedFeatureError
from mlx_kvret.mlx_backend.seeing import Seen, prepared

from . import folders_mlx, tiny_mlx
from .records import photo
from .test_mlx_models import CLOSE, Conversation

SHAPES = ((84, 84), (60, 90), (90, 48))
TEXTS = ("w5 w6 <image> w7 w8", "w9 w21", "w30 <image> w31 <image> w32")


PICTURES = [photo(seed, *shape) for seed, shape in enumerate(SHAPES)]
IMAGES = (PICTURES[:1], None, PICTURES[1:])


@pytest.fixture(scope="module", params=folders_mlx.NAMED)
def opened(request, tmp_path_factory):
    path = folders_mlx.folder(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, *mlx_kvret.load(path, None, backend="mlx")


@pytest.fixture(scope="module")
def talk(opened):
    """Turns as the processor and the tower make them."""
    name, model, processor = opened
    mlx_kvret.detach(model)
    turns = []
    for number, (text, images) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        if images is None:
            ids = mx.array([processor.tokenizer.encode(text, add_special_tokens=False)])
            out = model.get_input_embeddings(ids, None, mask=mx.ones_like(ids)).to_dict()
            embeds = out.pop("inputs_embeds")
            turns.append((ids, embeds, {key: value for key, value in out.items() if value is not None}))
            continue
        made = prepared(model, processor, text, images, number == 0)
        seen = Seen(model, made)
        turns.append((seen.ids, seen.embeds, {k: v for k, v in seen.given.items() if k not in made.given}))
    return Conversation(name, model, turns)


def attached(model):
    mlx_kvret.detach(model)
    mlx_kvret.attach(model, None)


def test_what_pictures_show_comes_through_the_tower(talk):
    (ids, embeds, _), *_ = talk.turns
    marked = np.flatnonzero(np.array(ids[0] == tiny_mlx.IMAGE))
    seen = np.array(embeds[0].astype(mx.float32))[marked]
    assert len(marked) >= 4 and np.abs(seen).max() > 0 and len(np.unique(seen.round(5), axis=0)) > 1


def test_the_words_are_those_of_mlx_vlms_own_loop(opened):
    name, model, processor = opened
    text = asked(processor, TEXTS[2], PICTURES[1:]).text
    mlx_kvret.detach(model)
    if name == "llava":
        # mlx-vlm's own functions cannot open its processor beside transformers 5
        with pytest.raises(ValueError, match="padding"):
            next(mlx_vlm.stream_generate(model, processor, text, image=PICTURES[1:]))
        expected = None
    else:
        found = mlx_vlm.stream_generate(model, processor, text, image=PICTURES[1:], max_tokens=6)
        expected = [one.token for one in found][:6]
    attached(model)
    given = {"images": PICTURES[1:], "budget": 4096, "policy": "recent", "max_tokens": 6}
    said = []
    for step in (2048, 7):
        found = mlx_kvret.stream_generate(model, processor, TEXTS[2], prefill_step_size=step, **given)
        said.append([one.token for one in found])
    assert said[0] == said[1] == (expected or said[0])
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5"}, {"type": "image"}]}
    ]
    few = given | {"budget": 8, "policy": "keydiff"}
    assert mlx_kvret.generate_batch(
        model, processor, [messages, "w5 w6"], **few | {"images": [PICTURES[1:], None]}
    ) == [
        mlx_kvret.generate(model, processor, messages, **few),
        mlx_kvret.generate(model, processor, "w5 w6", **few | {"images": None}),
    ]


def test_logits_by_both_oracles(talk):
    mlx_kvret.detach(talk.model)
    expected = talk.stock(tiny_mlx.stock_cache(talk.lm))
    kept = []
    attached(talk.model)
    try:
        large = mlx_kvret.make_cache(talk.model, budget=4096, policy="recent")
        assert tiny_mlx.apart(talk.bounded(large), expected) < CLOSE[talk.name]
        assert large.seen == talk.ids.shape[1] and len(large.pictures) >= 3
        small = mlx_kvret.make_cache(talk.model, budget=8, buffer=2, policy="keydiff")
        found = talk.bounded(small, before=lambda cache: kept.append(cache.kept_positions()))
        assert small.pictures == large.pictures and small.entries < large.entries / 2
    finally:
        mlx_kvret.detach(talk.model)
    assert tiny_mlx.apart(found, talk.dense(kept)) < CLOSE[talk.name]


@pytest.mark.parametrize("deep", [False, True])
def test_a_tower_that_makes_no_numbers_is_told(folder, tmp_path, deep):
    path = folder if deep else folders_mlx.folder("pixtral", tmp_path)
    model, processor = mlx_kvret.load(path, None, backend="mlx")
    tower = model.vision_tower
    part = tower.deepstack_merger_list[0].linear_fc2 if deep else tower.vision_model.patch_conv
    part.weight = mx.full(part.weight.shape, mx.inf)
    with pytest.raises(UnsupportedFeatureError, match="bfloat16 or float32"):
        mlx_kvret.generate(model, processor, "<image>", images=PICTURES[:1], budget=64, policy="recent")
