"""Prompts with pictures side by side: each row is what it would be alone, on both backends."""

import importlib
import json
import re

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import mlx_kvret
from mlx_kvret import rows
from mlx_kvret.api import backend_of
from mlx_kvret.cli import main
from mlx_kvret.core.picture_prompts import spoken_by
from mlx_kvret.demo import VISION_SAMPLE
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError

pytest.importorskip("mlx_vlm")
MARK = "<|vision_start|><|image_pad|><|vision_end|>"
OTHER = np.random.default_rng(3).integers(0, 256, (48, 80, 3), np.uint8)


def asking(text, *sources):
    parts = [{"type": "image", "image": one} for one in sources]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


PROMPTS = [
    ("recall Ada", [VISION_SAMPLE]),
    ("remember Ada amber recall Ada", None),
    (asking("recall Gilda", OTHER, VISION_SAMPLE), None),
    ("<image> and <image> recall Oscar", [OTHER, VISION_SAMPLE]),
    ("remember Ivan copper " * 12 + "recall Ivan", []),
    ("recall Thea", VISION_SAMPLE),
]
SAID = ["red", "amber", "blue", "green", "copper", "purple"]
BUDGETS, TOKENS = [24, 16, 12, 32, 8, 24], [6, 4, 9, 3, 7, 1]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def loaded(request):
    return mlx_kvret.load("demo-vision", backend=request.param)


@pytest.fixture(scope="module")
def alone(loaded):
    """Tokens and caches of each prompt by itself; no end token ends an answer early."""
    found = []
    for (prompt, images), budget, most in zip(PROMPTS, BUDGETS, TOKENS, strict=True):
        cache = mlx_kvret.make_cache(loaded[0], budget=budget)
        options = {"images": images, "cache": cache, "max_tokens": most, "prefill_step_size": 16}
        found.append(([one.token for one in mlx_kvret.stream_generate(*loaded, prompt, **options)], cache))
    return found


def batch(loaded, which=None, **options):
    which = range(len(PROMPTS)) if which is None else which
    prompts, images = zip(*(PROMPTS[i] for i in which), strict=True)
    given = {"images": images, "prefill_step_size": 16} | options
    tokens, last = {at: [] for at in range(len(prompts))}, {}
    for one in mlx_kvret.stream_batch(*loaded, prompts, **given):
        tokens[one.index].append(one.token)
        last[one.index] = one
    return tokens, last


@pytest.mark.parametrize("most", [1, 2, 8])
def test_a_row_is_what_it_would_be_alone(loaded, alone, most):
    tokens, last = batch(loaded, budget=BUDGETS, max_tokens=TOKENS, rows=most)
    for index, (expected, cache) in enumerate(alone):
        own = last[index].cache
        assert tokens[index] == expected
        assert last[index].prompt_tokens + len(expected) == own.seen == cache.seen
        assert own.pictures == cache.pictures and bool(own.pictures) == bool(PROMPTS[index][1] or index == 2)
        for ours, theirs in zip(own.kept_positions(), cache.kept_positions(), strict=True):
            assert [a.tolist() for a in ours] == [b.tolist() for b in theirs]
    texts = mlx_kvret.generate_batch(
        *loaded,
        [prompt for prompt, _ in PROMPTS],
        images=[images for _, images in PROMPTS],
        budget=BUDGETS,
        max_tokens=2,
    )
    assert [text.split()[0] for text in texts] == SAID


def test_pictures_that_wait_are_made_again_where_there_is_no_room(loaded, alone, monkeypatch):
    monkeypatch.setattr(rows, "HELD", 0)
    tokens, _ = batch(loaded, budget=BUDGETS, max_tokens=TOKENS, rows=2)
    assert [tokens[index] for index in range(len(PROMPTS))] == [expected for expected, _ in alone]


def test_of_pictures_that_wait_those_are_held_that_fit(loaded, monkeypatch):
    room = importlib.import_module(backend_of(loaded[0]).__package__ + ".batching")
    calls, make = [], room.prepared

    def counted(*given):
        calls.append(given[3][0].shape)
        return make(*given)

    monkeypatch.setattr(room, "prepared", counted)
    large, small = np.concatenate([OTHER] * 4), OTHER
    given = {"images": [[large], [small]], "budget": 8, "max_tokens": 1}
    list(mlx_kvret.stream_batch(*loaded, ["a", "b"], **given))
    assert calls == [large.shape, small.shape]
    size = make(*loaded, "b", [small], True)
    row = rows.Shown(None, None, size.tokens, None, None, size)
    monkeypatch.setattr(rows, "HELD", row.nbytes + 64)
    calls.clear()
    list(mlx_kvret.stream_batch(*loaded, ["a", "b"], **given))
    assert calls == [large.shape, small.shape, large.shape]


def test_turns_go_on_in_the_rows_caches_and_leave_them_as_they_are(loaded):
    _, first = batch(loaded, [0, 1, 2], budget=16, max_tokens=3)
    caches = [first[index].cache for index in range(3)]
    seen = [(cache.seen, cache.pictures) for cache in caches]
    prompts, images = (
        ["recall Oscar", "and <image> recall Thea", "recall Ada"],
        [[OTHER], VISION_SAMPLE, None],
    )
    found = mlx_kvret.generate_batch(*loaded, prompts, images=images, caches=caches, max_tokens=5)
    assert [(cache.seen, cache.pictures) for cache in caches] == seen
    expected = [
        mlx_kvret.generate(*loaded, prompt, images=own, cache=cache, max_tokens=5)
        for prompt, own, cache in zip(prompts, images, caches, strict=True)
    ]
    assert found == expected and [len(cache.pictures) for cache in caches] == [2, 1, 2]


def test_tokens_are_drawn_and_penalised_as_alone(loaded):
    options = {
        "budget": 24,
        "max_tokens": 8,
        "temp": 2.0,
        "repetition_penalty": 1.6,
        "repetition_context_size": 64,
    }
    which = [0, 1, 3]
    prompts, images = zip(*(PROMPTS[i] for i in which), strict=True)
    found = mlx_kvret.generate_batch(*loaded, prompts, images=images, seed=[5, 6, 5], **options)
    assert found == [
        mlx_kvret.generate(*loaded, prompt, images=own, seed=seed, **options)
        for prompt, own, seed in zip(prompts, images, [5, 6, 5], strict=True)
    ]


@pytest.mark.parametrize(
    ("prompts", "images", "options", "words"),
    [
        (["a", "b"], [[VISION_SAMPLE]], {}, "images has 1 values, there are 2 prompts"),
        (["a"], VISION_SAMPLE, {}, "images is a PosixPath; expected a list of one for each prompt"),
        (["a"], OTHER, {}, "images is a ndarray; expected a list"),
        (["a"], str(VISION_SAMPLE), {}, "images is a str; expected a list"),
        (["a", "<image>"], [None, []], {}, None),
        (["a", "b"], [[VISION_SAMPLE], ["none.png"]], {}, r"prompts\[1\]: images\[0\]: cannot read"),
        ([asking("a"), asking("b", None)], None, {}, r"prompts\[1\]: .*1 image parts without a picture"),
        (["a", "<|image_pad|> b"], None, {}, "1 tokens that stand for pictures, and there are none"),
        (["a"], [[OTHER]], {"policy": "full"}, "policy 'full' cannot stand in a batch"),
        (["a"], [[OTHER]], {"videos": ["a.mp4"]}, "a video is given as its frames"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_answered(loaded, prompts, images, options, words):
    given = {"budget": 8, "max_tokens": 1} | options
    if words is None:
        assert len(mlx_kvret.generate_batch(*loaded, prompts, images=images, **given)) == 2
        return
    with pytest.raises((ConfigError, UnsupportedFeatureError), match=words):
        list(mlx_kvret.stream_batch(*loaded, prompts, images=images, **given))


def test_a_row_ends_with_text(loaded):
    model, processor = loaded
    made = backend_of(model).processed(model, processor, f"b {MARK}", [PIL.Image.fromarray(OTHER)])
    ids = made["input_ids"].shape
    cut = {name: value[:, :-1] if value.shape[:2] == ids else value for name, value in made.items()}
    with pytest.raises(UnsupportedFeatureError, match="a prompt ends with a picture"):
        list(mlx_kvret.stream_batch(*loaded, ["a", cut], budget=8, max_tokens=1))
    # alone it is answered
    assert list(mlx_kvret.stream_generate(*loaded, cut, budget=8, max_tokens=1))


@pytest.mark.parametrize(
    "options", [{"scope": "modality"}, {"scope": "head", "policy": "keydiff"}, {"kv_bits": 4}], ids=str
)
def test_rows_of_every_way_to_evict(loaded, options):
    given = {"budget": 12, "buffer": 3, "max_tokens": 5, "prefill_step_size": 16} | options
    prompts, images = zip(*(PROMPTS[i] for i in (3, 1, 0)), strict=True)
    assert mlx_kvret.generate_batch(*loaded, prompts, images=images, **given) == [
        mlx_kvret.generate(*loaded, prompt, images=own, **given)
        for prompt, own in zip(prompts, images, strict=True)
    ]


def test_a_model_of_text_says_so():
    for backend in ("mlx", "torch"):
        with pytest.raises(ConfigError, match="reads text only"):
            mlx_kvret.generate_batch(*mlx_kvret.load("demo", backend=backend), ["a"], images=[[OTHER]])


def test_a_file_of_prompts_has_pictures_beside_it(loaded, tmp_path):
    backend = "torch" if hasattr(loaded[0], "generate") else "mlx"
    (tmp_path / "a b.png").write_bytes(VISION_SAMPLE.read_bytes())
    part, words = {"type": "image", "path": "a b.png"}, {"type": "text", "text": "recall Gilda"}
    missing = [{"role": "user", "content": [part | {"path": "x.png"}]}]
    lines = [
        {"prompt": "recall Ada", "images": ["a b.png"]},
        {
            "messages": [{"role": "user", "content": [part, words]}],
            "id": 7,
        },
        {"prompt": "remember Ada amber recall Ada"},
        {"messages": [{"role": "user", "content": "recall Thea"}], "images": [str(tmp_path / "a b.png")]},
    ]
    file = tmp_path / "prompts.jsonl"
    base = ["generate", "--model", "demo-vision", "--backend", backend, "--budget", "24", "--max-tokens", "4"]

    def run(*own):
        return CliRunner().invoke(main, [*base, *map(str, own)])

    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = run("--prompts", file, "--rows", 3)
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda made: made["index"])
    assert [made["text"].split()[0] for made in found] == ["red", "blue", "amber", "purple"]
    single = run("--prompt", "recall Ada", "--image", tmp_path / "a b.png")
    assert single.stdout.rstrip("\n") == found[0]["text"] and found[1]["id"] == 7
    for wrong, words in (
        ({"prompt": "a", "images": ["none.png"]}, "line 2 of .*none.png"),
        ({"prompt": "a", "images": "a b.png"}, "line 2 of .*expected a list of files"),
        (
            {"messages": missing},
            r"prompts\[1\].*cannot read",
        ),
        ({"prompt": "<image> a", "images": ["a b.png"] * 2}, "line 2 of .*1 places for a picture"),
    ):
        file.write_text("\n".join(map(json.dumps, [lines[2], wrong])), encoding="utf-8")
        done = run("--prompts", file)
        assert done.exit_code == 1 and not done.stdout
        assert re.search(words, done.stderr), done.stderr


def test_the_processor_sees_each_line_of_a_file_once(loaded, tmp_path, monkeypatch):
    kind = backend_of(loaded[0])
    calls, make = [], kind.processed

    def counted(*given):
        calls.append(given[2])
        return make(*given)

    monkeypatch.setattr(kind, "processed", counted)
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"recall {name}", "images": [str(VISION_SAMPLE)]} for name in ("Ada", "Gilda")]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    backend = "torch" if hasattr(loaded[0], "generate") else "mlx"
    base = ["generate", "--model", "demo-vision", "--backend", backend]
    done = CliRunner().invoke(main, [*base, "--budget", "24", "--max-tokens", "1", "--prompts", str(file)])
    assert done.exit_code == 0 and len(calls) == 2, done.stderr


def test_the_tokenizer_alone_knows_its_processor(loaded):
    model, processor = loaded
    assert mlx_kvret.generate_batch(
        model, spoken_by(processor), ["recall Ada"], images=[[VISION_SAMPLE]], budget=24, max_tokens=1
    ) == ["red"]
