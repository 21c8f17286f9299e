"""A vision-language folder on MLX: every form of a prompt, several turns, files, mlx-vlm's own functions."""

import copy
import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import mlx_vlm
import numpy as np
import PIL.Image
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_vlm.apc import APCManager
from mlx_vlm.generate.common import PromptCacheState
from mlx_vlm.models.cache import make_prompt_cache

import mlx_kvret
from mlx_kvret.core import installed
from mlx_kvret.errors import (
    ConfigError,
    MissingDependencyError,
    ModelMismatchError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mlx_kvret.mlx_backend.seeing import prepared

from . import folders

ONE, TWO = folders.picture(1), folders.picture(2, 2, 2)
ALL = {"budget": 256, "policy": "recent", "max_tokens": 6}
FEW = {"budget": 10, "buffer": 2, "policy": "keydiff", "scope": "global"}
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "recall Anna"}]}]
RENDERED = " user : <|vision_start|><|image_pad|><|vision_end|> recall Anna . assistant :"


@pytest.fixture(scope="module")
def loaded(folder):
    return mlx_kvret.load(folder, None, backend="mlx")


def stock(loaded, text, images, n=6):
    """Tokens of mlx-vlm's own loop with a full cache."""
    model, processor = loaded
    mlx_kvret.detach(model)
    try:
        pictures = [PIL.Image.fromarray(one) for one in images]
        found = mlx_vlm.stream_generate(model, processor, text, image=pictures, max_tokens=n)
        # the last response repeats the token before it
        return [one.token for one in found][:n]
    finally:
        mlx_kvret.attach(model, None)


def ours(loaded, prompt, **options):
    return [one.token for one in mlx_kvret.stream_generate(*loaded, prompt, **options)]


def test_every_form_of_a_prompt_reads_the_same(loaded, tmp_path):
    path = tmp_path / "one.png"
    PIL.Image.fromarray(ONE).save(path)
    expected = stock(loaded, RENDERED, [ONE])
    filled = copy.deepcopy(QUESTION)
    filled[0]["content"][0]["path"] = str(path)
    bare = [{"role": "user", "content": "recall Anna"}]
    made = loaded[1](text=[RENDERED], images=[PIL.Image.fromarray(ONE)], return_tensors="np")
    marked = RENDERED.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    forms = [
        (RENDERED, [ONE]),
        (marked, path),
        (QUESTION, [ONE]),
        (filled, None),
        (bare, [str(path)]),
        (made, None),
    ]
    for prompt, images in forms:
        assert ours(loaded, prompt, images=images, **ALL) == expected
    assert ours(loaded, QUESTION, images=[ONE], prefill_step_size=3, **ALL) == expected
    # a tokenizer knows the processor that it was loaded with
    assert ours((loaded[0], loaded[1].tokenizer), QUESTION, images=[ONE], **ALL) == expected
    assert ours(loaded, "see", images=[ONE, TWO], **ALL) == ours(
        loaded, "<image><image>see", images=[ONE, TWO], **ALL
    )
    assert ours(loaded, "recall Anna", **ALL) == stock(loaded, "recall Anna", [])


def test_responses_count_the_whole_prompt(loaded):
    model, _ = loaded
    cache = mlx_kvret.make_cache(model, **FEW)
    told = []
    found = list(
        mlx_kvret.stream_generate(
            *loaded,
            QUESTION,
            images=[ONE],
            cache=cache,
            max_tokens=4,
            prefill_step_size=5,
            prompt_progress_callback=lambda *at: told.append(at),
        )
    )
    prompt = found[0].prompt_tokens
    assert [one.seen for one in found] == [prompt + 1, prompt + 2, prompt + 3, prompt + 4]
    assert {one.prompt_tokens for one in found} == {prompt} and found[-1].finish_reason == "length"
    # no chunk cuts the picture of 12 tokens that begins at 5
    assert told == [(0, 22), (4, 22), (16, 22), (22, 22)] and prompt == 22
    assert cache.entries == found[-1].entries <= 12 * 4
    (picture,) = cache.pictures
    assert (picture.start, picture.end, picture.rows, picture.columns, picture.advance) == (4, 16, 3, 4, 4)


def test_a_later_turn_has_no_begin_token(loaded):
    words = loaded[1].tokenizer
    for first, text, begins in (
        (True, "and", "<s> and"),
        (False, "and", "and"),
        (True, "<s> and", "<s> and"),
    ):
        found = prepared(*loaded, f"{text} <image> x", [ONE], first)
        assert words.decode(found.tokens).startswith(begins + " <|vision_start|>")
        bare = prepared(*loaded, "x", [ONE], first).tokens
        assert words.decode(bare).startswith(("<s> " if first else "") + "<|vision_start|>")


def test_penalties_look_back_at_the_prompt(loaded):
    plain = ours(loaded, QUESTION, images=[ONE], **ALL)
    anna = loaded[1].tokenizer.encode(" Anna", add_special_tokens=False)[0]
    seen = []

    def note(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    assert ours(loaded, QUESTION, images=[ONE], logits_processors=[note], **ALL) == plain
    assert len(seen[0]) == 22 and anna in seen[0] and seen[1] == [*seen[0], plain[0]]


def test_a_saved_conversation_goes_on_in_a_new_process(loaded, folder, tmp_path):
    model, processor = loaded
    cache = mlx_kvret.make_cache(model, **FEW)
    list(mlx_kvret.stream_generate(*loaded, QUESTION, images=[ONE], cache=cache, max_tokens=3))
    mlx_kvret.save_cache(model, cache, tmp_path / "talk.kv")
    save_prompt_cache(str(tmp_path / "talk.safetensors"), cache)
    PIL.Image.fromarray(TWO).save(tmp_path / "two.png")
    expected = ours(loaded, "and <image> this", images=[TWO], cache=cache.copy(), max_tokens=5)
    text = ours(loaded, "and this", cache=copy.deepcopy(cache), max_tokens=5)
    script = f"""
import json, mlx_kvret
model, processor = mlx_kvret.load({str(folder)!r}, None, backend="mlx")
found = []
for prompt, images in (("and <image> this", [{str(tmp_path / "two.png")!r}]), ("and this", None)):
    cache, _ = mlx_kvret.load_cache(model, {str(tmp_path / "talk.kv")!r})
    answer = mlx_kvret.stream_generate(model, processor, prompt, images=images, cache=cache, max_tokens=5)
    found.append([one.token for one in answer])
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, text]
    # mlx-lm's own prompt files keep the pictures too
    again = load_prompt_cache(str(tmp_path / "talk.safetensors"))
    assert ours(loaded, "and <image> this", images=[TWO], cache=again, max_tokens=5) == expected
    assert len(cache.pictures) == 1 and processor is loaded[1]


def test_conversations_do_not_disturb_each_other(loaded):
    def talk(cache):
        yield ours(loaded, QUESTION, images=[ONE], cache=cache, max_tokens=4, prefill_step_size=6)
        yield ours(loaded, "recall Max", cache=cache, max_tokens=4)
        yield ours(loaded, "<image> recall Eva", images=[TWO], cache=cache, max_tokens=4)

    alone = list(talk(mlx_kvret.make_cache(loaded[0], **FEW)))
    one, other = (mlx_kvret.make_cache(loaded[0], **FEW) for _ in range(2))
    mixed = []
    streams = talk(one), talk(other)
    for _ in range(3):
        mixed.append([next(stream) for stream in streams])
    assert mixed == [[part, part] for part in alone]
    # two answers at once, token by token
    first, second = (
        mlx_kvret.stream_generate(*loaded, QUESTION, images=[image], max_tokens=4, **FEW)
        for image in (ONE, TWO)
    )
    pairs = [(a.token, b.token) for a, b in zip(first, second, strict=True)]
    again = [ours(loaded, QUESTION, images=[image], max_tokens=4, **FEW) for image in (ONE, TWO)]
    assert pairs == list(zip(*again, strict=True))


def test_tokens_are_taken_back_but_no_part_of_a_picture(loaded):
    model, _ = loaded
    cache = mlx_kvret.make_cache(model, budget=64, buffer=32, policy="recent")
    list(mlx_kvret.stream_generate(*loaded, "see", images=[ONE], cache=cache, max_tokens=1))
    assert not cache[0].is_trimmable() and cache[0].start_position == 0
    with pytest.raises(UnsupportedFeatureError, match="kept or forgotten as a whole"):
        cache[0].trim(cache.seen - 5)
    for entry in cache:
        entry.trim(2)
    assert cache.pictures and cache.seen == 15
    for entry in cache:
        entry.trim(14)
    assert cache.pictures == () and cache.seen == 1
    fresh = mlx_kvret.make_cache(model, budget=64, buffer=32, policy="recent")
    model.language_model(mx.array([[0]]), cache=fresh)
    assert ours(loaded, "see", images=[TWO], cache=cache, max_tokens=4) == ours(
        loaded, "see", images=[TWO], cache=fresh, max_tokens=4
    )


def test_a_text_read_with_pictures_is_asked_about(loaded, tmp_path):
    model, _ = loaded
    cache = mlx_kvret.read(*loaded, "remember <image> and <image> now", images=[ONE, TWO], **FEW)
    assert [one.tokens for one in cache.pictures] == [12, 4]
    answers = mlx_kvret.answer(*loaded, cache, ["recall Anna", "recall Max"], max_tokens=3)
    assert (
        len(answers) == 2
        and cache.seen
        == mlx_kvret.read(
            *loaded, "remember <image> and <image> now", images=[ONE, TWO], prefill_step_size=4, **FEW
        ).seen
    )
    mlx_kvret.save_cache(model, cache, tmp_path / "read.kv")
    again, _ = mlx_kvret.load_cache(model, tmp_path / "read.kv")
    assert mlx_kvret.answer(*loaded, again, ["recall Anna", "recall Max"], max_tokens=3) == answers
    with pytest.raises(ConfigError, match="read through the chat template"):
        mlx_kvret.read(*loaded, "x", images=[ONE], raw=True)


# ---------------------------------------------------------------- wrong use


def test_what_cannot_work_is_refused(loaded, folder):
    model, processor = loaded
    demo = mlx_kvret.load("demo", None, backend="mlx")
    for (one, reader), prompt, options, words in (
        (demo, "x", {"images": [ONE]}, "this model reads text only"),
        ((model.language_model, processor), "x", {"images": [ONE]}, "give the whole one"),
        ((model, demo[1]), "x", {"images": [ONE]}, "need the model's processor"),
        (loaded, "<image> x", {"images": [ONE, TWO]}, "1 places for a picture"),
        (loaded, "<|image_pad|> x", {}, "1 tokens that stand for pictures, and there are none"),
        (loaded, [1, 2], {"images": [ONE]}, "give text or messages"),
        (loaded, QUESTION, {}, "1 image parts without a picture"),
        (loaded, {"input_ids": [[1], [2]], "pixel_values": [0.0]}, {}, "give one row"),
    ):
        with pytest.raises(ConfigError, match=words):
            mlx_kvret.generate(one, reader, prompt, policy="recent", **options)
    with pytest.raises(UnsupportedFeatureError, match="reads no pictures"):
        mlx_kvret.generate(*loaded, "x", images=[ONE], draft_model=demo[0], policy="recent")
    with pytest.raises(ModelMismatchError):
        mlx_kvret.generate(*demo, "x", cache=mlx_kvret.make_cache(model, policy="recent"))
    cache = mlx_kvret.make_cache(model, policy="recent")
    with pytest.raises(UnsupportedFeatureError, match="does not work with a cache of one"):
        model.language_model(mx.array([[1, 2], [3, 4]]), cache=cache)
    with pytest.raises(ConfigError, match="it counts positions itself"):
        model.language_model(mx.array([[1, 2]]), cache=cache, position_ids=mx.array([[[5, 6]]] * 3))
    assert cache.seen == 0


def test_attaching_finds_the_language_model_once(loaded):
    model, _ = loaded
    mlx_kvret.detach(model)
    try:
        assert mlx_kvret.attach(model, None, policy="recent", budget=8) is model
        assert make_prompt_cache(model.language_model).shared.config.budget == 8
        mlx_kvret.attach(model.language_model, None, policy="recent", budget=16)
        assert mlx_kvret.make_cache(model).shared.config.budget == 16
        with pytest.raises(UnsupportedModelError, match="detach it first"):
            mlx_kvret.attach(model.language_model.model, None)
        mlx_kvret.detach(model)
        assert type(make_prompt_cache(model.language_model)) is list
    finally:
        mlx_kvret.attach(model, None)


def test_a_folder_without_mlx_vlm_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(installed, "_there", lambda package: package != "mlx_vlm")
    with pytest.raises(
        MissingDependencyError, match=r"run `pip install 'mlx-kvret\[vlm\]'`, or give text_only"
    ):
        mlx_kvret.load(folder, None, backend="mlx")
    model, tokenizer = mlx_kvret.load(folder, None, backend="mlx", text_only=True)
    assert type(model).__module__ == "mlx_lm.models.qwen3_vl"
    assert mlx_kvret.generate(model, tokenizer, "recall Anna", policy="recent", max_tokens=2)
    with pytest.raises(ConfigError, match="is a model of text; drop it"):
        mlx_kvret.load("demo", None, backend="mlx", text_only=True)
    with pytest.raises(ConfigError, match="does not work with a vision-language model"):
        mlx_kvret.load(folder, None, backend="mlx", adapter_path=folder)


# ---------------------------------------------------------------- mlx-vlm's own functions


@pytest.fixture
def bounded(loaded):
    mlx_kvret.attach(loaded[0], None, **FEW)
    yield loaded
    mlx_kvret.attach(loaded[0], None)


def theirs(loaded, text=RENDERED, images=(ONE,), n=4, **options):
    pictures = [PIL.Image.fromarray(one) for one in images]
    found = list(mlx_vlm.stream_generate(*loaded, text, image=pictures, max_tokens=n, **options))
    return [one.token for one in found][:n], found[-1].cached_tokens


def test_their_loop_reads_as_ours(bounded):
    cache = mlx_kvret.make_cache(bounded[0])
    own = mlx_kvret.make_cache(bounded[0])
    expected = ours(bounded, RENDERED, images=[ONE], cache=own, max_tokens=4, prefill_step_size=2048)
    assert theirs(bounded, prompt_cache=cache)[0] == expected
    assert mlx_vlm.generate(*bounded, RENDERED, image=[PIL.Image.fromarray(ONE)], max_tokens=4).text.split()
    assert cache.seen == own.seen and cache.pictures == own.pictures
    # a second picture on the same cache, which mlx-vlm itself would count as text
    # and there a turn begins with the begin token, as every text does
    expected = ours(bounded, "<s> and <image> this", images=[TWO], cache=own, max_tokens=4)
    text = "and <|vision_start|><|image_pad|><|vision_end|> this"
    assert theirs(bounded, text, [TWO], prompt_cache=cache)[0] == expected
    assert cache.pictures == own.pictures and cache.seen == own.seen
    # chunks that cut a picture
    expected = stock(bounded, RENDERED, [ONE], 4)
    mlx_kvret.attach(bounded[0], None, policy="recent", budget=256)
    assert theirs(bounded, prefill_step_size=5)[0] == expected


@pytest.mark.parametrize(
    "given", [{"kv_bits": 8}, {"kv_bits": 3.5, "quantized_kv_start": 0}, {"max_kv_size": 64}]
)
def test_options_without_effect_are_refused(bounded, given):
    with pytest.raises(UnsupportedFeatureError, match="has no effect on a bounded"):
        theirs(bounded, **given)


def test_full_caches_are_as_before(loaded):
    mlx_kvret.detach(loaded[0])
    cache = make_prompt_cache(loaded[0].language_model)
    mlx_kvret.attach(loaded[0], None)
    assert theirs(loaded, prompt_cache=cache, kv_bits=8)[0] == stock(loaded, RENDERED, [ONE], 4)


def test_their_prefix_caches_are_answered_truly(bounded):
    expected = theirs(bounded)[0]
    manager = APCManager(num_blocks=64, block_size=4)
    assert [theirs(bounded, apc_manager=manager) for _ in range(2)] == [(expected, 0)] * 2
    state = PromptCacheState()
    assert theirs(bounded, prompt_cache_state=state)[0] == expected
    # more of the same conversation goes on with the cache; a changed one is read again
    held, seen = state.cache, state.cache.seen
    ids = mx.array([[*state.token_ids, *bounded[1].tokenizer.encode("recall Max", add_special_tokens=False)]])
    given = {"input_ids": ids, "mask": mx.ones(ids.shape, mx.int32), "prompt_cache_state": state}
    assert theirs(bounded, None, (), **given)[1] == seen and state.cache is held
    changed = RENDERED.replace("Anna", "Max")
    assert theirs(bounded, changed, prompt_cache_state=state) == (theirs(bounded, changed)[0], 0)
    assert state.cache is not held and held.pictures


def test_batches_are_refused_by_both(bounded, tmp_path):
    PIL.Image.fromarray(ONE).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="does not yet support batching"):
        mlx_vlm.batch_generate(
            *bounded, images=[str(tmp_path / "one.png")] * 2, prompts=["a", "b"], max_tokens=2
        )
    assert mlx_lm.generate and np.array(ONE).shape == (48, 64, 3)
