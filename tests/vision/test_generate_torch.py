"""``load``, ``generate`` and saved readings with pictures on torch, through the models' own processors."""

from __future__ import annotations

from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch

import mlx_kvret
from mlx_kvret.core import installed
from mlx_kvret.cuda_backend import api, processors
from mlx_kvret.cuda_backend.cache import cache_argument
from mlx_kvret.cuda_backend.seeing import Seen, prepared
from mlx_kvret.errors import ConfigError, MissingDependencyError, UnsupportedFeatureError

from .folders_torch import folder
from .records import photo
from .tiny_torch import IMAGE

NAMES = ("qwen2_5_vl", "qwen3_vl", "glm4v", "gemma3", "gemma4", "llava", "idefics3", "internvl")
LARGE: dict[str, Any] = {"budget": 4096, "policy": "recent"}
WORDS = "w5 w6 <image> w7 w8 <image> w9"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @once
    def load(name: str) -> tuple[Any, Any]:
        return mlx_kvret.load(folder(name, tmp_path_factory.mktemp(name)), None, backend="torch")

    return load


def tokens(model: Any, processor: Any, prompt: Any, **options: Any) -> list[int]:
    stream = mlx_kvret.stream_generate(model, processor, prompt, max_tokens=6, **options)
    return [response.token for response in stream]


@torch.no_grad()
def greedy(model: Any, given: dict[str, Any], count: int = 6) -> list[int]:
    """By the model as it is: everything again for each token."""
    found: list[int] = []
    mlx_kvret.detach(model)
    kinds = [name for name in given if name.endswith("token_type_ids")]
    for _ in range(count):
        found.append(int(model(**given, use_cache=False).logits[0, -1].argmax()))
        given = given | {"input_ids": torch.cat([given["input_ids"], torch.tensor([found[-1:]])], 1)}
        given |= {name: torch.nn.functional.pad(given[name], (0, 1)) for name in kinds}
    mlx_kvret.attach(model, None)
    return found


def stops_at(model: Any, listed: list[int]) -> list[int]:
    """Up to an end of the text."""
    ends = [at for at, token in enumerate(listed) if token == 2]
    return listed[: ends[0] + 1] if ends else listed


@pytest.mark.parametrize("name", NAMES)
def test_two_pictures_in_a_text_in_chunks(name: str, opened: Any) -> None:
    model, processor = opened(name)
    pictures = [photo(1), photo(2, 60, 90)]
    made = prepared(model, processor, WORDS, pictures, True)
    expected = stops_at(model, greedy(model, {"input_ids": made.ids, **made.given}))
    for step in (2048, 9):
        found = tokens(model, processor, WORDS, images=pictures, prefill_step_size=step, **LARGE)
        assert found == expected
    # what the processor made is a prompt as well
    again = {"input_ids": made.ids.numpy(), **{key: value.numpy() for key, value in made.given.items()}}
    assert tokens(model, processor, again, **LARGE) == expected


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava"])
def test_turns_with_pictures_go_on_in_a_cache_that_was_saved(name: str, opened: Any, tmp_path: Path) -> None:
    model, processor = opened(name)
    first = [
        {"role": "user", "content": [{"type": "image", "image": photo(3)}, {"type": "text", "text": "w21"}]}
    ]
    cache = mlx_kvret.make_cache(model, **LARGE)
    said = tokens(model, processor, first, cache=cache)
    mlx_kvret.save_cache(model, cache, tmp_path / "talk.kv")
    second = {"images": [photo(4, 56, 84)], "prefill_step_size": 5}
    found = tokens(model, processor, "w30 <image> w31 w32", cache=cache, **second)
    reopened, _ = mlx_kvret.load_cache(model, tmp_path / "talk.kv")
    assert tokens(model, processor, "w30 <image> w31 w32", cache=reopened, **second) == found
    assert reopened.pictures == cache.pictures and len(cache.pictures) == 2

    one = prepared(model, processor, first, None, True)
    two = prepared(model, processor, "w30 <image> w31 w32", [photo(4, 56, 84)], False)
    whole: dict[str, Any] = {"input_ids": torch.cat([one.ids, torch.tensor([said]), two.ids], 1)}
    for key in one.given:
        parts = [one.given[key], two.given[key]]
        if key.endswith("token_type_ids"):
            whole[key] = torch.cat([parts[0], torch.zeros(1, len(said), dtype=torch.long), parts[1]], 1)
        else:
            whole[key] = torch.cat(parts)
    assert found == stops_at(model, greedy(model, whole))


def test_a_reading_with_pictures_and_text_after_it(opened: Any) -> None:
    model, processor = opened("qwen2_5_vl")
    cache = mlx_kvret.make_cache(model, budget=8, policy="keydiff")
    made = api.processed(model, processor, "w5 <|vision_start|> <|image_pad|> <|vision_end|> w6", [photo(5)])
    api.read_tokens(model, cache, made, 4)
    assert cache.seen == made["input_ids"].shape[1]
    beside = mlx_kvret.make_cache(model, budget=8, policy="keydiff")
    seen = Seen(model, prepared(model, processor, made, None, True))
    with torch.no_grad():
        seen.read(beside, 4)
        seen.finish(beside)
    assert tokens(model, processor, "w7 w8", cache=cache) == tokens(model, processor, "w7 w8", cache=beside)


def test_batches_go_on_where_pictures_were_read(opened: Any) -> None:
    model, processor = opened("qwen3_vl")
    options: dict[str, Any] = {"budget": 16, "policy": "keydiff"}
    caches = [mlx_kvret.make_cache(model, **options) for _ in range(2)]
    for at, cache in enumerate(caches):
        api.read_tokens(
            model,
            cache,
            api.processed(
                model,
                processor,
                "w5 <|vision_start|> <|image_pad|> <|vision_end|> w6",
                [photo(at, 84, 28 * (at + 1))],
            ),
            64,
        )
    alone = [tokens(model, processor, "w7 w8", cache=cache.copy()) for cache in caches]
    found: list[list[int]] = [[], []]
    for response in mlx_kvret.stream_batch(
        model, processor.tokenizer, ["w7 w8"] * 2, caches=caches, max_tokens=6
    ):
        found[response.index].append(response.token)
    assert found == alone


def test_wrong_use_is_refused(opened: Any, tmp_path: Path) -> None:
    model, processor = opened("qwen3_vl")
    with pytest.raises(ConfigError, match="2 places for a picture"):
        tokens(model, processor, WORDS, images=[photo(1)], **LARGE)
    with pytest.raises(ConfigError, match="has its pictures already"):
        made = api.processed(model, processor, "w5 <|vision_start|> <|image_pad|> <|vision_end|>", [photo(1)])
        tokens(model, processor, made, images=[photo(1)], **LARGE)
    with pytest.raises(ConfigError, match="tokens of pictures and no pictures"):
        tokens(model, processor, [5, IMAGE, IMAGE, 6, 7], **LARGE)
    with pytest.raises(ConfigError, match="its pictures make 9"):
        short = dict(made) | {"input_ids": made["input_ids"][:, 3:]}
        tokens(model, processor, short, **LARGE)
    text, tokenizer = mlx_kvret.load("demo", backend="torch")
    with pytest.raises(ConfigError, match="reads text only"):
        tokens(text, tokenizer, "recall", images=[photo(1)])
    with pytest.raises(ConfigError, match="text_only"):
        mlx_kvret.load(tmp_path, None, backend="torch", text_only=True)
    with pytest.raises(MissingDependencyError, match="torchvision"):
        processor.video_processor([])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llava", "vision_tower.embeddings.patch_embedding"),
        ("qwen3_vl", "visual.deepstack_merger_list.0.linear_fc2"),
    ],
)
def test_a_tower_that_makes_no_numbers_is_told(
    name: str, part: str, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = opened(name)
    weight = model.model.get_submodule(part).weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight, torch.inf))
    with pytest.raises(UnsupportedFeatureError, match="bfloat16 or float32"):
        tokens(model, processor, "w5 <image> w6", images=photo(1), **LARGE)


@pytest.mark.parametrize("name", NAMES)
def test_rows_with_and_without_pictures(name: str, opened: Any) -> None:
    model, processor = opened(name)
    prompts = [WORDS, "w5 w6 w7 w8", "w9 <image> w6"]
    images = [[photo(1), photo(2, 60, 90)], None, photo(3)]
    options: dict[str, Any] = {"budget": 8, "buffer": 2, "policy": "keydiff", "prefill_step_size": 16}
    expected = []
    for prompt, own in zip(prompts, images, strict=True):
        cache = mlx_kvret.make_cache(model, budget=8, buffer=2, policy="keydiff")
        said = tokens(model, processor, prompt, images=own, cache=cache, prefill_step_size=16)
        expected.append((said, cache.pictures, cache.seen))
    if name.startswith("gemma"):
        with pytest.raises(UnsupportedFeatureError, match="one clock for all rows"):
            list(mlx_kvret.stream_batch(model, processor, prompts, images=images, **options))
        return
    found: list[list[int]] = [[], [], []]
    last: dict[int, Any] = {}
    for one in mlx_kvret.stream_batch(model, processor, prompts, images=images, max_tokens=6, **options):
        found[one.index].append(one.token)
        last[one.index] = one.cache
    assert [(said, last[i].pictures, last[i].seen) for i, said in enumerate(found)] == expected


def test_the_users_own_calls_with_what_the_processor_makes(opened: Any) -> None:
    model, processor = opened("qwen3_vl")
    made = processor(
        text=["w5 <|vision_start|> <|image_pad|> <|vision_end|> w6"], images=[photo(1)], return_tensors="pt"
    )
    cache = mlx_kvret.make_cache(model, **LARGE)
    out = model.generate(**made, **cache_argument(model, cache), max_new_tokens=6, do_sample=False)
    stock = greedy(model, {key: value for key, value in made.items() if key != "attention_mask"})
    assert stops_at(model, out[0, made["input_ids"].shape[1] :].tolist()) == stops_at(model, stock)


def test_a_folder_without_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*args: Any, **options: Any) -> None:
        raise ImportError("AutoImageProcessor requires the PIL library but it was not found")

    path = folder("qwen3_vl", tmp_path)
    there = installed._there
    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", lacking)
    monkeypatch.setattr(installed, "_there", lambda package: package != "PIL" and there(package))
    with pytest.raises(
        MissingDependencyError, match=r"needs Pillow; run `pip install 'mlx-kvret\[pictures\]'`"
    ):
        mlx_kvret.load(path, None, backend="torch")
