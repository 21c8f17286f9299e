"""The same folder on both backends: the same entries are kept, and a saved talk goes on on the other one."""

import pytest

import mlx_kvret

from . import folders

ONE, TWO = folders.picture(1), folders.picture(2, 2, 2)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "recall Anna"}]}]
HOW = {"budget": 10, "buffer": 2}


@pytest.fixture(scope="module")
def sides(folder):
    return {name: mlx_kvret.load(folder, None, backend=name) for name in ("mlx", "torch")}


def said(side, prompt, cache, images=None):
    options = {"images": images} if images else {}
    found = mlx_kvret.stream_generate(
        *side, prompt, cache=cache, max_tokens=4, prefill_step_size=6, **options
    )
    return [one.token for one in found]


def held(cache):
    return [[head.tolist() for head in layer] for layer in cache.kept_positions()]


RULES = [{"policy": "keydiff", "scope": "global"}, {"policy": "random", "scope": "global"}]
RULES += [{"policy": "random", "scope": "modality", "picture_share": 0.25}]


@pytest.mark.parametrize("rule", RULES)
def test_a_talk_with_pictures_is_the_same_and_goes_on_on_the_other_side(sides, tmp_path, rule):
    after = {}
    for name, side in sides.items():
        cache = mlx_kvret.make_cache(side[0], **HOW, **rule)
        first = said(side, QUESTION, cache, [ONE])
        mlx_kvret.save_cache(side[0], cache, tmp_path / name)
        before = held(cache)
        later = [said(side, "and <image> this", cache, [TWO]), said(side, "more", cache)]
        after[name] = [first, before, *later, held(cache)]
    assert after["mlx"] == after["torch"]
    for name, other in (("mlx", "torch"), ("torch", "mlx")):
        side = sides[name]
        cache, _ = mlx_kvret.load_cache(side[0], tmp_path / other)
        assert held(cache) == after[name][1]
        assert [said(side, "and <image> this", cache, [TWO]), said(side, "more", cache)] == after[name][2:4]
