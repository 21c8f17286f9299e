"""Pictures in any turn, in saved, copied, interleaved and batched talks, and in transformers' own loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import mlx_kvret
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError, UnsupportedModelError

from .oracle_torch import TURNS, Part, calls, read, relative, stock_logits, whole
from .tiny_torch import BLOCKS, CONFIGS, GRIDS, SERVED, Picture, prompt, tiny_model

NEAR = 2e-6
SMALL: dict[str, Any] = {"budget": 8, "buffer": 2, "policy": "keydiff"}
OTHER: list[list[Part]] = [
    [[7, 5], Picture(4, 8, 5), [9, 31, 32]],
    [[33, 34], Picture(6, 6, 6), [35]],
    [[36]],
]
SOME = ("qwen2_5_vl", "gemma3", "llava")


def attached(name: str) -> PreTrainedModel:
    return mlx_kvret.attach(tiny_model(name), None)


def large(model: PreTrainedModel) -> BoundedCache:
    return mlx_kvret.make_cache(model, budget=4096, policy="recent")


@pytest.mark.parametrize("name", [*GRIDS, "gemma4"])
@pytest.mark.parametrize("policy", ["keydiff", "full"])
def test_two_conversations_in_turn_do_not_disturb_each_other(name: str, policy: str) -> None:
    model = attached(name)
    options = SMALL if policy != "full" else {"policy": "full"}
    alone = [read(model, mlx_kvret.make_cache(model, **options), calls(name, t)) for t in (TURNS, OTHER)]
    caches = [mlx_kvret.make_cache(model, **options) for _ in range(2)]
    found: list[list[torch.Tensor]] = [[], []]
    for both in zip(calls(name, TURNS[:3]), calls(name, OTHER), strict=True):
        for call, cache, own in zip(both, caches, found, strict=True):
            own.append(read(model, cache, [call]))
    found[0].append(read(model, caches[0], calls(name, TURNS[3:])))
    # a stock cache of the same model, in between, is as it always was
    for own, expected in zip(found, alone, strict=True):
        assert torch.equal(torch.cat(own), expected)


NEW_PROCESS = """
import sys, torch, mlx_kvret
from tests.vision.oracle_torch import calls, read, TURNS
from tests.vision.tiny_torch import tiny_model
for name in sys.argv[2:]:
    model = mlx_kvret.attach(tiny_model(name), None)
    cache, _ = mlx_kvret.load_cache(model, f"{sys.argv[1]}/{name}.kv")
    torch.save(read(model, cache, calls(name, TURNS)[2:]), f"{sys.argv[1]}/{name}.pt")
"""


def test_a_saved_conversation_goes_on_in_a_new_process(tmp_path: Path) -> None:
    names, expected = ("qwen3_vl", "glm4v", "gemma3", "internvl"), {}
    for name in names:
        model = attached(name)
        cache = mlx_kvret.make_cache(model, **SMALL)
        given = calls(name, TURNS)
        read(model, cache, given[:2])
        mlx_kvret.save_cache(model, cache, tmp_path / f"{name}.kv")
        expected[name] = read(model, cache, given[2:])
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", NEW_PROCESS, str(tmp_path), *names], check=True, cwd=root)
    for name in names:
        assert relative(torch.load(tmp_path / f"{name}.pt"), expected[name]) < NEAR


@pytest.mark.parametrize("name", SOME)
def test_copies_and_tokens_taken_back(name: str) -> None:
    model = attached(name)
    cache, given = mlx_kvret.make_cache(model, **SMALL | {"budget": 64}), calls(name, TURNS)
    read(model, cache, given[:2])
    twin = cache.copy()
    expected = read(model, cache, given[2:])
    assert relative(read(model, twin, given[2:]), expected) < NEAR

    cache = large(model)
    first = read(model, cache, given[:1])
    read(model, cache, given[2:3])
    length = given[2]["input_ids"].shape[1]
    with pytest.raises(UnsupportedFeatureError, match="a picture stands at"):
        cache.crop(-10)
    # the whole turn, its picture too
    if name not in BLOCKS:
        cache.crop(-length)
        assert len(cache.pictures) == 1 and cache.seen == len(first)
        assert relative(read(model, cache, given[1:2]), read(model, *_first_two(model, given))) < NEAR


def _first_two(model: PreTrainedModel, given: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    cache = large(model)
    read(model, cache, given[:1])
    return cache, given[1:2]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3_5", "gemma3", "idefics3"])
@pytest.mark.parametrize("policy", ["keydiff", "full"])
def test_a_padded_batch_answers_as_each_row_alone(name: str, policy: str) -> None:
    model = attached(name)
    options = SMALL if policy != "full" else {"policy": "full"}
    rows: list[list[Part]] = [
        [[5, 6], Picture(6, 8, 1), [7, 8, 9]],
        [[11, 12, 13, 14, 15], Picture(4, 4, 2), [16]],
    ]
    calls_of = [prompt(name, parts) for parts in rows]
    most = max(call["input_ids"].shape[1] for call in calls_of)
    batch: dict[str, Any] = {}
    for key in calls_of[0]:
        parts = [call[key] for call in calls_of]
        if parts[0].ndim == 2 and key != "image_grid_thw" and key != "pixel_values":
            parts = [torch.nn.functional.pad(part, (most - part.shape[1], 0)) for part in parts]
        batch[key] = torch.cat(parts)
    lengths = [call["input_ids"].shape[1] for call in calls_of]
    mask = torch.stack([torch.arange(most) >= most - length for length in lengths]).long()
    cache = mlx_kvret.make_cache(model, **options)
    steps = torch.tensor([[3, 14, 15], [9, 2, 6]])
    with torch.no_grad():
        found = [model(**batch, attention_mask=mask, **cache_argument(model, cache)).logits[:, -1:]]
        for at in range(steps.shape[1]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": steps[:, at : at + 1], "attention_mask": mask}
            found.append(model(**step, **cache_argument(model, cache)).logits)
    for row, call in enumerate(calls_of):
        alone = mlx_kvret.make_cache(model, **options)
        given = [call, *({"input_ids": steps[row : row + 1, at : at + 1]} for at in range(steps.shape[1]))]
        expected = read(model, alone, given)[lengths[row] - 1 :]
        assert relative(torch.cat(found, 1)[row], expected) < NEAR
        if policy != "full":
            assert cache.sight.pictures(2)[row] == alone.pictures


def tokens_of(model: PreTrainedModel, given: dict[str, Any], **options: Any) -> list[int]:
    mask = torch.ones_like(given["input_ids"])
    out = model.generate(
        **given, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options
    )
    return out[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", SERVED)
def test_transformers_own_loop(name: str) -> None:
    model = tiny_model(name)
    parts: list[Part] = [[5, 6, 7, 8, 9], Picture(6, 8, 1), [11, 12], Picture(4, 8, 2), [13, 14, 15]]
    given = prompt(name, parts)
    stock = tokens_of(model, given)
    mlx_kvret.attach(model, None)
    cache = large(model)
    assert tokens_of(model, given, **cache_argument(model, cache)) == stock
    if name in BLOCKS:
        with pytest.raises(UnsupportedFeatureError, match="cut in two"):
            tokens_of(model, given, **cache_argument(model, large(model)), prefill_chunk_size=9)
        return
    chunked = large(model)
    assert tokens_of(model, given, **cache_argument(model, chunked), prefill_chunk_size=9) == stock
    told = [[(p.start, p.end, p.advance) for p in own.pictures] for own in (chunked, cache)]
    assert told[0] == told[1]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "gemma3", "smolvlm"])
def test_a_second_turn_with_a_picture_in_transformers_own_loop(name: str) -> None:
    model = attached(name)
    first: list[Part] = [[5, 6, 7], Picture(6, 8, 1), [11, 12]]
    cache = large(model)
    said = tokens_of(model, prompt(name, first), **cache_argument(model, cache))
    second: list[Part] = [[21], Picture(4, 8, 2), [22, 23]]
    whole_text = prompt(name, [*first, said, *second])
    new = prompt(name, second)
    pictures = {key: value for key, value in new.items() if key in ("pixel_values", "image_grid_thw")}
    got = tokens_of(model, whole_text | pictures, **cache_argument(model, cache))
    mlx_kvret.detach(model)
    assert got == tokens_of(model, whole_text)
    assert len(cache.pictures) == 2


def test_wrong_use_is_refused() -> None:
    model = attached("qwen3_vl")
    call = prompt("qwen3_vl", [[5, 6], Picture(), [7]])
    cache = large(model)

    def refused(match: str, error: type[Exception] = ConfigError, **given: Any) -> None:
        with pytest.raises(error, match=match), torch.no_grad():
            model(**given, **cache_argument(model, cache))
        assert cache.seen == 0 and cache.pictures == ()

    refused("tokens of pictures and no pictures", input_ids=call["input_ids"])
    refused(
        "and not their image_grid_thw",
        **{k: v for k, v in call.items() if k != "image_grid_thw"}
        | {"pixel_values": None, "mm_encoder_outputs": {"image": None}},
    )
    refused(
        "position_ids end before", input_ids=torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[4, 5, 6]])
    )
    refused(
        "other than .sequences, tokens.",
        UnsupportedFeatureError,
        **call | {"attention_mask": torch.ones(1, 1, 8, 8)},
    )
    # the types of tokens may be left out
    del call["mm_token_type_ids"]
    assert (
        relative(
            read(model, cache, [call]),
            stock_logits(tiny_model("qwen3_vl"), "qwen3_vl", [[[5, 6], Picture(), [7]]]),
        )
        < NEAR
    )


def test_a_picture_that_is_cut_is_refused_where_its_tokens_see_each_other() -> None:
    model = attached("gemma3")
    call, cache = whole("gemma3", TURNS[:1]), large(model)
    embeds = model.get_input_embeddings()(call["input_ids"])
    halves = [slice(0, 10), slice(10, None)]
    given = [
        {"inputs_embeds": embeds[:, part], "token_type_ids": call["token_type_ids"][:, part]}
        for part in halves
    ]
    with pytest.raises(UnsupportedFeatureError, match="cut in two"):
        read(model, cache, given)


@pytest.mark.parametrize("name", ["paligemma", "mllama"])
def test_models_that_would_answer_wrongly_are_refused_by_name(name: str) -> None:
    config = AutoConfig.for_model(name, **CONFIGS.get(name, {}))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedModelError, match=f"{name} models cannot be bounded: its"):
        mlx_kvret.attach(model, None)
