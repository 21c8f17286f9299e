"""The public functions on the torch backend."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mlx_kvret
from mlx_kvret import demo
from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.sampling import Sampling
from mlx_kvret.cuda_backend import api, versions
from mlx_kvret.cuda_backend import layer as layer_module
from mlx_kvret.cuda_backend.kernels import dispatch
from mlx_kvret.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    ModelMismatchError,
    UnsupportedFeatureError,
)

from .tiny import attached, checkpoint, new_cache, run, tiny_model

IDS = torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(8))[0].tolist()


def test_the_demo_answers_within_its_budget() -> None:
    model, tokenizer = mlx_kvret.load("demo", backend="torch")
    prompt = demo.STORY.read_text() + " recall Stella"
    *_, last = mlx_kvret.stream_generate(model, tokenizer, prompt, budget=64, max_tokens=4)
    heads = api.hooks.attachment(model).layout.shape.heads
    assert last.entries <= (64 + 8) * heads < last.seen * heads
    assert last.cache_nbytes <= api.hooks.attachment(model).layout.shape.nbytes(64, 8) * 1.2
    texts = [mlx_kvret.generate(model, tokenizer, prompt, budget=b, max_tokens=4) for b in (64, "150kB")]
    assert texts == ["salmon", "salmon"]


def test_streaming_gives_what_forced_passes_give() -> None:
    model, _ = attached("llama")
    cache = mlx_kvret.make_cache(model, budget=12, buffer=4)
    options: dict[str, Any] = {"cache": cache, "prefill_step_size": 7, "max_tokens": 9}
    reads: list[tuple[int, int]] = []
    progress = {"prompt_progress_callback": lambda done, total: reads.append((done, total))}
    responses = list(mlx_kvret.stream_generate(model, None, IDS, **options, **progress))
    again, tokens = new_cache(model, budget=12, buffer=4), []
    for part in [*torch.tensor([IDS[:-1]]).split(7, 1), torch.tensor([IDS[-1:]])]:
        logits = run(model, part, again)
    for _ in range(9):
        tokens.append(int(logits[0, -1].argmax()))
        logits = run(model, torch.tensor([tokens[-1:]]), again)
    assert [r.token for r in responses] == tokens
    assert "".join(r.text for r in responses) == "".join(f"{t} " for t in tokens)
    assert [r.finish_reason for r in responses] == [None] * 8 + ["length"]
    assert responses[-1].seen == 60 + 9 and responses[-1].prompt_tokens == 60
    assert reads[0] == (0, 60) and reads[-1] == (60, 60)


def test_samplers_and_processors_decide() -> None:
    model, _ = attached("qwen3")
    forced = iter([5, 17, 40])

    def only(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -1e9).index_fill(1, torch.tensor([next(forced)]), 0.0)

    options = {"budget": 8, "max_tokens": 3}
    text = mlx_kvret.generate(model, None, IDS, logits_processors=[only], **options)
    assert text == "5 17 40 "
    draws = [
        mlx_kvret.generate(model, None, IDS, **api.sampling(model, Sampling(5.0, 0.9, seed)), **options)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2] and api.sampling(model, Sampling()) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "words"}, "no tokenizer"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prefill_step_size": 0}, "prefill_step_size"),
        ({"kv_bits": 5}, "kv_bits"),
        ({"budget": "1B"}, "too small"),
        ({"budget": 4, "sinks": 9}, "sinks"),
        ({"cache": "made", "budget": 4}, "budget"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    model, _ = attached("qwen2")
    if "cache" in options:
        options["cache"] = mlx_kvret.make_cache(model)
    with pytest.raises(ConfigError, match=message):
        mlx_kvret.generate(model, None, **{"prompt": IDS} | options)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    model = mlx_kvret.attach(tiny_model("llama"))
    with pytest.raises(ConfigError, match="no retention gates"):
        mlx_kvret.make_cache(model)
    with pytest.raises(UnsupportedFeatureError, match="assistant_model"):
        mlx_kvret.generate(model, None, IDS, draft_model=model, policy="recent")
    assert mlx_kvret.make_cache(model, 16, policy="recent").shared.config.budget == 16
    with pytest.raises(CheckpointError, match=r"config\.json"):
        mlx_kvret.load(tmp_path, backend="torch")
    made = checkpoint(model, 3)
    other = dataclasses.replace(made.config, base_fingerprint="intermediate_size=99")
    save_gates(tmp_path / "gates", other, made.tensors)
    with pytest.raises(ModelMismatchError, match="another model"):
        mlx_kvret.attach(model, tmp_path / "gates")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            api.load("demo", device="cuda")


def test_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # as in a process that has not used the backend yet
    monkeypatch.delitem(sys.modules, "mlx_kvret.cuda_backend.api")
    monkeypatch.setattr(versions.metadata, "version", lambda name: {"torch": "2.13.0+cpu"}.get(name, "5.3.1"))
    with pytest.raises(MissingDependencyError, match=r"transformers is 5\.3\.1, expected at least 5\.17"):
        mlx_kvret.load("demo", backend="torch")


def test_running_out_of_memory_says_which_chunk_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = attached("gemma3_text")
    cache = mlx_kvret.make_cache(model, 16)
    run(model, torch.tensor([IDS[:20]]), cache)

    def small(queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        if queries.shape[2] > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return dispatch.attend(queries, *rest)

    monkeypatch.setattr(layer_module, "attend", small)
    with pytest.raises(CacheError, match=r"after 20 tokens .*prefill_step_size=8 fits"):
        mlx_kvret.generate(model, None, IDS[20:], cache=cache, prefill_step_size=32, max_tokens=2)
    assert cache.seen == 20
    text = mlx_kvret.generate(model, None, IDS[20:], cache=cache, prefill_step_size=8, max_tokens=2)
    monkeypatch.undo()
    fresh = mlx_kvret.make_cache(model, 16)
    run(model, torch.tensor([IDS[:20]]), fresh)
    assert text == mlx_kvret.generate(model, None, IDS[20:], cache=fresh, prefill_step_size=8, max_tokens=2)


def test_the_shape_of_a_cache_is_known_without_weights() -> None:
    config, shape = api.cache_shape(demo.MODEL)
    model, _ = mlx_kvret.load("demo", backend="torch")
    assert shape == api.hooks.attachment(model).layout.shape
    assert config["hidden_size"] == shape.hidden_size
    cache = mlx_kvret.make_cache(model, 16)
    run(model, torch.tensor([IDS[:20]]), cache)
    assert api.full_cache(model, cache) == (shape.heads, 20 * shape.heads * shape.entry_bytes)
