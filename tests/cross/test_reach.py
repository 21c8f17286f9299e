"""Texts beyond the positions that a model was made for: said once, on either backend."""

import copy

import pytest

import mlx_kvret
from mlx_kvret.core import advice
from mlx_kvret.core.advice import reach_of


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(advice, "_warned", set())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "mlx_kvret"]


def demo(backend, monkeypatch):
    """The demo as if made for 40 tokens."""
    module = "mlx_kvret.mlx_backend.hooks" if backend == "mlx" else "mlx_kvret.cuda_backend.probe"
    monkeypatch.setattr(f"{module}.reach_of", lambda config: reach_of(dict(config)) and 40)
    return mlx_kvret.load("demo", backend=backend)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_text_that_is_too_long(backend, caplog, monkeypatch):
    model, tokenizer = demo(backend, monkeypatch)
    assert not warnings(caplog)
    cache = mlx_kvret.make_cache(model, budget=8)
    mlx_kvret.generate(model, tokenizer, [5] * 20, cache=cache, max_tokens=1)
    assert not warnings(caplog)
    other = cache.copy()
    answer = list(mlx_kvret.stream_generate(model, None, [5] * 17, cache=cache, max_tokens=8))
    assert cache.seen == 21 + 17 + len(answer) > 40
    assert len(warnings(caplog)) == 1 and "longer than the 40 tokens" in warnings(caplog)[0]
    mlx_kvret.generate(model, tokenizer, [5] * 30, cache=other, max_tokens=4)
    mlx_kvret.generate_batch(model, tokenizer, [[5] * 60, [6] * 50], budget=8, max_tokens=2)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: cache.copy(), None], ids=["deep", "copy", "rows"]
)
def test_copies_and_rows_know_it_too(backend, copied, caplog, monkeypatch):
    model, tokenizer = demo(backend, monkeypatch)
    cache = mlx_kvret.make_cache(model, budget=8)
    mlx_kvret.generate(model, tokenizer, [5] * 30, cache=cache, max_tokens=1)
    if copied is None:
        mlx_kvret.generate_batch(model, tokenizer, [[5] * 20, [6] * 3], caches=[cache, cache], max_tokens=2)
    else:
        mlx_kvret.generate(model, tokenizer, [5] * 20, cache=copied(cache), max_tokens=2)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 8}, 64),
        ({"max_position_embeddings": 40960, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 16384),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": {"factor": 8}}}, 64),
        ({"max_position_embeddings": 100, "rope_scaling": None}, 100),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_what_a_config_says(config, reach):
    assert reach_of(config) == reach
