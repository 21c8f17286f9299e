"""The demo with eyes, as it is shipped: it answers what it saw, on both backends, and is evaluated."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mlx_kvret
from mlx_kvret import demo
from mlx_kvret.demo.albums import album
from mlx_kvret.demo.pictures import NAMES, PALETTE
from mlx_kvret.errors import ConfigError, UnsupportedModelError
from mlx_kvret.evaluation import open_bench, parse_methods
from mlx_kvret.evaluation.tasks import make_samples

PIL = pytest.importorskip("PIL")
pytest.importorskip("PIL.Image")
ROOT = Path(__file__).parents[2]
# what the sample picture states, and what its decoys say of the same names
FACTS = {"Ada": "red", "Gilda": "blue", "Oscar": "green", "Thea": "purple"}
GENERATES = ("mlx", "torch")
NEEDS = {"mlx": ("mlx_vlm",), "torch": ("torch", "transformers")}


def wanted(backend):
    for name in NEEDS[backend]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")


@pytest.fixture(scope="module", params=("mlx", "torch"))
def bench(request):
    wanted(request.param)
    found = open_bench("demo-vision", parse_methods(["learned"]), backend=request.param, chunk=32, buffer=0)
    found.engines[0].use_gates(found.gates["demo-vision"])
    return found


def generating(bench):
    if bench.engines[0].name not in GENERATES:
        pytest.skip("this backend does not generate with pictures yet")
    return bench


def test_answers_what_the_sample_picture_states(bench):
    (engine,) = generating(bench).engines
    for name, value in FACTS.items():
        said = mlx_kvret.generate(
            engine.model,
            bench.tokenizer,
            f"<image> recall {name}",
            images=[demo.VISION_SAMPLE],
            budget=24,
            max_tokens=4,
        )
        assert said.split()[0] == value


def test_one_picture_needs_no_list_and_a_video_is_named(bench):
    model = generating(bench).engines[0].model
    given = {"budget": 24, "max_tokens": 2}
    pixels = np.array(PIL.Image.open(demo.VISION_SAMPLE).convert("RGB"))
    said = set()
    for one in (demo.VISION_SAMPLE, str(demo.VISION_SAMPLE), pixels, [demo.VISION_SAMPLE]):
        read = mlx_kvret.read(model, bench.tokenizer, "recall Max", images=one, budget=24)
        said.add((read.seen, *mlx_kvret.answer(model, bench.tokenizer, read, "recall Ada", max_tokens=2)))
    assert len(said) == 1 and "red" in next(iter(said))[1]
    for wrong, words in (
        ({"videos": ["a.mp4"]}, "a video is given as its frames, as images"),
        ({"image": demo.VISION_SAMPLE}, "pictures are given as images"),
    ):
        with pytest.raises(ConfigError, match=words):
            mlx_kvret.generate(model, bench.tokenizer, "recall Ada", **wrong, **given)
    # what a processor makes of one, whose pixels would be left out
    ids = np.array([[5, 6, model.config.video_token_id, 7]])
    made = {"input_ids": ids, "pixel_values_videos": np.zeros((4, 384), np.float32)}
    made["video_grid_thw"] = np.array([[1, 2, 2]])
    with pytest.raises(ConfigError, match=r"holds a video \(pixel_values_videos\); give its frames"):
        mlx_kvret.generate(model, bench.tokenizer, made, **given)
    frames = mlx_kvret.generate(model, bench.tokenizer, "recall Ada", images=[pixels] * 3, **given)
    assert frames == mlx_kvret.generate(
        model, bench.tokenizer, "<image><image><image>recall Ada", images=[demo.VISION_SAMPLE] * 3, **given
    )
    for kind, words in (("video_url", "give its frames"), ("input_audio", "parts of type text or image")):
        with pytest.raises(ConfigError, match=words):
            messages = [{"role": "user", "content": [{"type": kind, kind: "a"}]}]
            mlx_kvret.generate(model, bench.tokenizer, messages, **given)


def test_a_question_in_a_later_turn_within_a_small_budget(bench):
    (engine,) = generating(bench).engines
    made = album(300, 6, 2, 5)
    cache = mlx_kvret.make_cache(engine.model, budget=16, buffer=2)
    pictures = [p.image for p in made.pictures]
    first = f"{made.prompt()} recall {NAMES[next(iter(made.facts))]}"
    mlx_kvret.generate(engine.model, bench.tokenizer, first, images=pictures, cache=cache, max_tokens=2)
    assert cache.seen == len(made.ids) + 4
    right = 0
    for fact, (value, _) in made.facts.items():
        own, asked = cache.copy(), f"recall {NAMES[fact]}"
        said = mlx_kvret.generate(engine.model, bench.tokenizer, asked, cache=own, max_tokens=1)
        right += said.split() == [list(PALETTE)[value]]
    assert right >= 6


def test_albums_with_the_shipped_gates(bench):
    (engine,) = bench.engines
    samples = make_samples("albums", 256, 2, 1)
    full, learned, recent = (
        np.mean([o.score for o in engine.run(samples, method, 16)])
        for method in parse_methods(["full", "learned", "recent"])
    )
    assert full > 0.9 and learned > 0.7 and recent < 0.3


def test_both_backends_keep_the_same(tmp_path):
    wanted("mlx"), wanted("torch")
    kept = []
    (method,) = parse_methods(["learned"])
    (sample,) = make_samples("albums", 256, 1, 2)
    for backend in ("mlx", "torch"):
        found = open_bench("demo-vision", [method], backend=backend, chunk=32, buffer=0)
        (engine,) = found.engines
        engine.use_gates(next(iter(found.gates.values())))
        cache = engine.new_cache(method, 12)
        engine.take_in(sample.turns[0], cache, 32)
        held = cache.kept_positions() if backend == "mlx" else cache.kept_positions(0)
        kept.append([[np.asarray(head).tolist() for head in layer] for layer in held])
    assert kept[0] == kept[1]


def test_eval_on_the_command_line(tmp_path):
    wanted("torch")
    from mlx_kvret.cli import main

    out = tmp_path / "cells.json"
    asked = ["eval", "--model", "demo-vision", "--length", "256", "--samples", "2", "--budget", "1/16"]
    methods = [x for m in ("full", "learned", "learned:scope=modality", "snapkv") for x in ("--method", m)]
    done = CliRunner().invoke(
        main, [*asked, *methods, "--backend", "reference", "--chunk", "16", "--out", str(out), "--quiet"]
    )
    assert done.exit_code == 0, done.output
    cells = json.loads(out.read_text())["cells"]
    assert {c["task"] for c in cells.values()} == {"albums"} and len(cells) == 4
    assert "albums, 256 tokens" in done.output


def test_a_model_of_text_is_told_so():
    wanted("torch")
    found = open_bench("demo", parse_methods(["keydiff"]), backend="torch")
    with pytest.raises(UnsupportedModelError, match="does not take pictures"):
        found.engines[0].run(make_samples("albums", 200, 1, 0), parse_methods(["keydiff"])[0], 16)


def test_fifty_pictures_in_constant_memory():
    """The benchmark's talk, shorter: no turn holds more than the second did, and what was seen is known."""
    wanted("mlx")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from picture_talk import talk
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    model, processor = mlx_kvret.load("demo-vision", backend="mlx")
    found = talk(model, processor, 12, budget=24, buffer=4)
    held = [turn.held for turn in found[2:]]
    assert max(held) < 1.02 * min(held)
    assert all(turn.entries <= 24 + 4 for turn in found)
    assert found[-1].seen > 12 * 36 and sum(turn.right for turn in found) >= 10


def test_a_conversation_begins_once(bench):
    """Begin, picture with its borders, and question, once as messages; a later turn has no begin token."""
    (engine,) = generating(bench).engines
    cache = mlx_kvret.make_cache(engine.model, budget=24)
    parts = [{"type": "image"}, {"type": "text", "text": "recall Ada"}]
    asked = {"images": [demo.VISION_SAMPLE], "cache": cache, "max_tokens": 1}
    mlx_kvret.generate(engine.model, bench.tokenizer, [{"role": "user", "content": parts}], **asked)
    assert cache.seen == (1 + 38 + 2) + 1
    mlx_kvret.generate(engine.model, bench.tokenizer, ". <image> recall Ada", **asked)
    assert cache.seen == (1 + 38 + 2) + 1 + (1 + 38 + 2) + 1


def test_inspect_draws_a_picture_as_its_patches(tmp_path):
    wanted("mlx")
    from mlx_kvret.cli import main

    page = tmp_path / "page.html"
    asked = ["inspect", "--model", "demo-vision", "--backend", "mlx", "--image", str(demo.VISION_SAMPLE)]
    kept = ["--budget", "8", "--buffer", "1", "--prefill-step-size", "16", "--max-tokens", "2"]
    done = CliRunner().invoke(main, [*asked, "-p", "recall Ada", *kept, "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("red")
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    told = json.loads(found[1])
    assert told["pictures"] == [[2, 38, 6]] and len(told["texts"]) == told["now"][0] == 43
    assert len(told["compactions"]) >= 1
    alone = CliRunner().invoke(main, [*asked, "--out", str(page)])
    assert alone.exit_code != 0 and "--prompt" in alone.output
    kept = {"budget": 8, "buffer": 1, "prefill_step_size": 16, "max_tokens": 2, "title": "demo-vision"}
    loaded = mlx_kvret.load("demo-vision", backend="mlx")
    same = mlx_kvret.inspect(*loaded, prompt="recall Ada", images=[demo.VISION_SAMPLE], **kept)
    assert same.answer.startswith("red") and json.loads(json.dumps(same.data)) == told


@pytest.mark.parametrize("backend", GENERATES)
def test_inspect_takes_pictures(backend):
    wanted(backend)
    loaded = mlx_kvret.load("demo-vision", backend=backend)
    asked = {"prompt": "<image> recall Oscar", "images": demo.VISION_SAMPLE, "budget": 24}
    found = mlx_kvret.inspect(*loaded, "remember Max amber", **asked, max_tokens=1)
    assert found.answer.strip() == "green" and found.data["pictures"] == [[5, 41, 6]]
    with pytest.raises(ConfigError, match="give a prompt too"):
        mlx_kvret.inspect(*loaded, "a", images=[demo.VISION_SAMPLE], budget=8)
    with pytest.raises(ConfigError, match="drop raw"):
        mlx_kvret.inspect(*loaded, raw=True, **asked)
    with pytest.raises(ConfigError, match="1 places for a picture"):
        mlx_kvret.inspect(*loaded, **asked | {"images": [demo.VISION_SAMPLE] * 2})
    with pytest.raises(ConfigError, match="reads text only"):
        mlx_kvret.inspect(*mlx_kvret.load("demo", backend=backend), **asked)
