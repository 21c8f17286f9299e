"""Kept entries in few bits in talks with pictures: the same on both backends, and in files."""

from __future__ import annotations

import pytest

import mlx_kvret

from . import folders

ONE, TWO = folders.picture(1), folders.picture(2, 2, 2)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "recall Anna"}]}]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = folders.qwen3_vl(tmp_path_factory.mktemp("heads_of_64"), head=64)
    return {name: mlx_kvret.load(folder, None, backend=name) for name in ("mlx", "torch")}


def said(side, prompt, cache, images=()):
    options = {"images": images} if images else {}
    found = mlx_kvret.stream_generate(
        *side, prompt, cache=cache, max_tokens=4, prefill_step_size=6, **options
    )
    return [one.token for one in found]


def held(cache):
    return [[head.tolist() for head in layer] for layer in cache.kept_positions()]


def turns(side, cache):
    return [said(side, "and <image> this", cache, [TWO]), said(side, "more", cache)], held(cache)


@pytest.mark.parametrize("bits", [8, "k8v4", 4])
@pytest.mark.parametrize(
    "rule",
    [
        {"policy": "recent"},
        {"policy": "keydiff"},
        {"policy": "random", "scope": "modality", "picture_share": 0.25},
    ],
    ids=lambda rule: rule["policy"],
)
def test_a_talk_goes_on_from_files_on_either_side(sides, tmp_path, bits, rule):
    after = {}
    for name, side in sides.items():
        cache = mlx_kvret.make_cache(side[0], budget=10, buffer=2, kv_bits=bits, **rule)
        first = said(side, QUESTION, cache, [ONE])
        mlx_kvret.save_cache(side[0], cache, tmp_path / name)
        before = held(cache)
        after[name] = first, before, turns(side, cache)
        assert cache.entries < cache.seen * 4 and len(cache.pictures) == 2
    assert after["mlx"] == after["torch"]
    for name, other in (("mlx", "torch"), ("torch", "mlx")):
        cache, _ = mlx_kvret.load_cache(sides[name][0], tmp_path / other)
        assert held(cache) == after[name][1]
        assert turns(sides[name], cache) == after[name][2]
