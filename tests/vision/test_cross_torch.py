"""Pictures on both backends with the same weights: the same entries, and saved talks that cross over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_kvret
from mlx_kvret.api import backend_of
from mlx_kvret.errors import ConfigError

from .folders_torch import MARKS, family, folder
from .records import photo

# it sees keys, so that a wrong rotation or a wrong mask shows
OPTIONS: list[dict[str, Any]] = [
    {"policy": "keydiff", "scope": "global"},
    {"policy": "keydiff", "scope": "head"},
    {"policy": "keydiff", "scope": "modality", "picture_share": 0.5},
]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name, and model by backend, of one folder; and what torch's processor makes of two turns."""
    name = request.param
    path = folder(name, tmp_path_factory.mktemp(name))
    torch_model, processor = mlx_kvret.load(path, None, backend="torch")
    mlx_model, _ = mlx_kvret.load(path, None, backend="mlx")
    mark, api = MARKS[family(name)], backend_of(torch_model)
    turns = []
    for number, text in enumerate((f"w5 w6 {mark} w7 w8 w21", f"w30 {mark} w31 w32 w9 w8 w7")):
        made = api.processed(torch_model, processor, text, [photo(number, 84, 56 + 28 * number)])
        turns.append({key: value.numpy() for key, value in made.items()})
    return name, {"torch": torch_model, "mlx": mlx_model}, turns


def read(model: Any, cache: Any, turn: dict[str, Any]) -> None:
    backend_of(model).read_tokens(model, cache, turn, 16)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['policy']}-{o['scope']}")
def test_the_same_entries_and_snapshots_that_cross(
    sides: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    _, models, turns = sides
    kept, after = {}, {}
    for backend, model in models.items():
        cache = mlx_kvret.make_cache(model, budget=10, buffer=2, **options)
        read(model, cache, turns[0])
        mlx_kvret.save_cache(model, cache, tmp_path / f"{backend}.kv")
        read(model, cache, turns[1])
        kept[backend], after[backend] = cache.kept_positions(), cache.pictures
        assert cache.entries < cache.seen * sum(len(own) for own in kept[backend])
    assert after["torch"] == after["mlx"] and len(after["torch"]) == 2
    _same(kept["torch"], kept["mlx"])
    for backend, other in (("torch", "mlx"), ("mlx", "torch")):
        cache, _ = mlx_kvret.load_cache(models[backend], tmp_path / f"{other}.kv")
        read(models[backend], cache, turns[1])
        _same(cache.kept_positions(), kept[backend])
        assert cache.pictures == after[backend]


def _same(found: Any, expected: Any) -> None:
    assert [[h.tolist() for h in own] for own in found] == [[h.tolist() for h in own] for own in expected]


def test_what_transformers_saved_of_glm4v_counts_and_rotates_alike(tmp_path: Path) -> None:
    """The towers differ by how they stretch their positions; what comes after them does not."""
    path, logits, seen = folder("glm4v", tmp_path), [], []
    for backend in ("torch", "mlx"):
        model, processor = mlx_kvret.load(path, None, backend=backend)
        cache = mlx_kvret.make_cache(model, budget=512, policy="recent")
        given = {"cache": cache, "max_tokens": 1}
        first = next(iter(mlx_kvret.stream_generate(model, processor, "w5 w6 w7 w8", **given)))
        logits.append(np.array(first.logprobs, np.float32).reshape(-1))
        mlx_kvret.generate(model, processor, "w9 <image> w6", images=photo(1, 84, 56), **given)
        # the same with the mark alone, which has around it what the template puts there
        mlx_kvret.generate(model, processor, "w9 <|image|> w6", images=photo(1, 84, 56), **given)
        seen.append(cache.pictures)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert seen[0] == seen[1] and [p.advance for p in seen[0]] == [3, 3]


def test_pictures_without_what_stands_before_them_are_not_read_as_text(tmp_path: Path) -> None:
    for backend in ("torch", "mlx"):
        model, processor = mlx_kvret.load(folder("qwen3_vl", tmp_path), None, backend=backend)
        bare = backend_of(model).processed(model, processor, "w5 <|image_pad|> w6", [photo(1, 84, 56)])
        cache = mlx_kvret.make_cache(model, budget=512, policy="recent")
        if backend == "torch":
            mlx_kvret.generate(model, processor, bare, cache=cache, max_tokens=1)
            assert [p.advance for p in cache.pictures] == [3]
            continue
        # mlx-vlm counts by what stands before
        with pytest.raises(ConfigError, match="would be read as text"):
            mlx_kvret.generate(model, processor, bare, cache=cache, max_tokens=1)
        assert cache.seen == 0
