"""Hooked models against the stock ones they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_near
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, TextIteratorStreamer

from mlx_kvret.cuda_backend import api, hooks
from mlx_kvret.cuda_backend.cache import cache_argument
from mlx_kvret.cuda_backend.reading import Reading
from mlx_kvret.errors import (
    ModelMismatchError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)

from .tiny import FAMILIES, SIZES, attached, checkpoint, new_cache, run, tiny_model

IDS = torch.randint(1, 96, (1, 75), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_budget_equals_the_stock_model(family: str) -> None:
    stock = run(tiny_model(family), IDS, None)
    model, _ = attached(family)
    cache = new_cache(model, budget=128)
    steps = [IDS[:, :40], IDS[:, 40:60], *IDS[:, 60:].split(1, 1)]
    ours = torch.cat([run(model, step, cache) for step in steps], 1)
    assert_near(ours, stock, 64)
    assert cache.seen == 75 and cache.entries == 75 * 2 * len(cache.competing)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_in_chunks_equals_one_pass_at_a_time(family: str) -> None:
    model, _ = attached(family)
    options = {"budget": 16, "buffer": 4}
    cache = new_cache(model, **options)
    generated = model.generate(
        IDS, **cache_argument(model, cache), max_new_tokens=12, do_sample=False, prefill_chunk_size=9
    )
    again, ids = new_cache(model, **options), IDS
    for chunk in IDS[:, :-1].split(9, 1):
        run(model, chunk, again)
    for _ in range(12):
        ids = torch.cat([ids, run(model, ids[:, -1:], again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)
    run(model, ids[:, -1:], again)
    assert cache.seen == again.seen == 75 + 12


def test_sampling_stopping_and_streaming() -> None:
    model, _ = attached("qwen3")

    class Numbers:
        def decode(self, ids: list[int], **_: object) -> str:
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)
    out = model.generate(
        IDS,
        **cache_argument(model, new_cache(model, budget=8)),
        max_new_tokens=9,
        do_sample=True,
        top_k=20,
        streamer=streamer,
    )
    assert "".join(streamer) == Numbers().decode(out[0, 75:].tolist())
    anything = list(range(96))
    ended = model.generate(
        IDS, **cache_argument(model, new_cache(model, budget=8)), max_new_tokens=9, eos_token_id=anything
    )
    assert ended.shape[1] == 76


def test_continuing_a_cache() -> None:
    model, _ = attached("llama")
    cache = new_cache(model, budget=12)
    first = model.generate(IDS, **cache_argument(model, cache), max_new_tokens=5, do_sample=False)
    more = model.generate(first, **cache_argument(model, cache), max_new_tokens=5, do_sample=False)
    whole = model.generate(
        IDS, **cache_argument(model, new_cache(model, budget=12)), max_new_tokens=10, do_sample=False
    )
    assert torch.equal(more, whole)


def test_assisted_decoding_takes_rejected_tokens_back() -> None:
    model, _ = attached("llama")
    options = {"max_new_tokens": 20, "do_sample": False, "assistant_model": tiny_model("llama", seed=7)}
    stock = tiny_model("llama").generate(IDS, max_new_tokens=20, do_sample=False)
    assert torch.equal(
        model.generate(IDS, **cache_argument(model, new_cache(model, budget=128)), **options), stock
    )
    small = new_cache(model, budget=12, buffer=6)
    assert model.generate(IDS, **cache_argument(model, small), **options).shape == stock.shape
    assert small.entries <= (12 + 6) * 6


def test_detaching_restores_the_model() -> None:
    model, _ = attached("gemma3_text")
    hooks.remove(model)
    hooks.remove(model)
    assert model.config._attn_implementation == "sdpa" and hooks.attachment(model) is None
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(run(model, IDS, None), run(tiny_model("gemma3_text"), IDS, None))


def test_a_hooked_model_without_a_bounded_cache_is_the_stock_one() -> None:
    stock, (model, _) = tiny_model("gemma3_text"), attached("gemma3_text")
    mask = torch.ones_like(IDS)
    mask[:, :7] = 0
    for options in ({}, {"attention_mask": mask}):
        expected = run(stock, IDS, DynamicCache(config=stock.config), **options)
        assert torch.equal(run(model, IDS, DynamicCache(config=model.config), **options), expected)
    full = new_cache(model, policy="full")
    assert torch.equal(run(model, IDS, full), run(stock, IDS, None))
    assert full.entries == 75 * 2 * 2 and full.kept_positions()[1][0].tolist() == list(range(75))


def test_beam_search_and_other_masks_are_refused() -> None:
    model, _ = attached("qwen2")
    with pytest.raises(UnsupportedFeatureError, match="beam search"):
        model.generate(IDS, **cache_argument(model, new_cache(model)), max_new_tokens=3, num_beams=2)
    with pytest.raises(UnsupportedFeatureError, match="attention mask"):
        run(model, IDS, new_cache(model), attention_mask=torch.ones(1, 1, 75, 75, dtype=torch.bool))
    holes = torch.ones_like(IDS)
    holes[:, 3] = 0
    with pytest.raises(UnsupportedFeatureError, match="left"):
        run(model, IDS, new_cache(model), attention_mask=holes)


def test_gates_of_another_model_are_refused() -> None:
    from mlx_kvret.cuda_backend.gates import from_checkpoint

    model = tiny_model("llama")
    with pytest.raises(ModelMismatchError, match="5 layers, the model has 3"):
        hooks.install(model, from_checkpoint(checkpoint(model, 5)), {})
    assert hooks.attachment(model) is None and model.config._attn_implementation == "sdpa"


def test_models_that_cannot_be_bounded_are_refused() -> None:
    from transformers import MistralConfig

    windows = MistralConfig(**SIZES, sliding_window=16)
    with pytest.raises(UnsupportedModelError, match="nothing to bound"):
        hooks.install(AutoModelForCausalLM.from_config(windows), None, {})


def test_models_whose_layers_share_keys_are_refused(tmp_path: Path) -> None:
    shares = AutoConfig.for_model(
        "gemma3n_text", **SIZES | {"num_hidden_layers": 4}, head_dim=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96, num_kv_shared_layers=2, laurel_rank=4, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shares)
    with pytest.raises(UnsupportedModelError, match="gemma3n_text"):
        hooks.install(model, None, {})
    # no layer is left from which the full ones could share: transformers' own complaint
    model.config.num_kv_shared_layers = 3
    with pytest.raises(UnsupportedModelError, match="does not run this gemma3n_text model"):
        hooks.install(model, None, {})
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not run this gemma3n_text model"):
        api.cache_shape(tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_pass_that_runs_out_of_memory_leaves_the_cache_as_it_was(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = attached(family)
    caches = [new_cache(model, budget=16, buffer=4) for _ in range(2)]
    for cache in caches:
        run(model, IDS[:, :50], cache)
    stock, calls = Reading.append, iter([True, False])

    def append(self: Reading, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Any:
        if not next(calls):
            raise torch.OutOfMemoryError("no memory")
        return stock(self, layer, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(Reading, "append", append)
        with pytest.raises(torch.OutOfMemoryError):
            run(model, IDS[:, 50:70], caches[0])
    assert caches[0].seen == 50
    for part in IDS[:, 50:].split(7, 1):
        assert torch.equal(run(model, part, caches[0]), run(model, part, caches[1]))
