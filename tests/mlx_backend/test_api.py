"""The public functions on MLX, and every way to call them wrongly."""

import json
import shutil

import mlx.core as mx
import pytest
from tiny import forward, gated, prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret import demo
from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.errors import (
    CheckpointError,
    ConfigError,
    KVRetError,
    ModelMismatchError,
    UnsupportedModelError,
)


@pytest.fixture
def folder(tmp_path):
    """The demo's model under another path, free to be damaged."""
    return shutil.copytree(demo.MODEL, tmp_path / "model")


def test_generate_and_stream_generate_agree_and_report_the_cache():
    model, tokenizer = mlx_kvret.load("demo")
    text = mlx_kvret.generate(model, tokenizer, "the weary miller", budget=8, max_tokens=30)
    responses = list(mlx_kvret.stream_generate(model, tokenizer, "the weary miller", budget=8, max_tokens=30))
    assert "".join(r.text for r in responses) == text and len(text.split()) == 30
    last, heads = responses[-1], shape_of(model).heads
    assert last.seen == 34 and last.prompt_tokens == 4 and last.generation_tokens == 30
    assert all(0 < r.entries <= 9 * heads and r.cache_nbytes > 0 for r in responses)


def test_verbose_prints_the_text_and_figures(capsys):
    model, tokenizer = mlx_kvret.load("demo")
    text = mlx_kvret.generate(model, tokenizer, "the", budget=8, max_tokens=5, verbose=True)
    printed = capsys.readouterr().out
    assert printed.startswith(text) and "entries of" in printed


def test_a_cache_goes_on_and_only_its_first_prompt_begins():
    model, tokenizer = mlx_kvret.load("demo")
    cache = mlx_kvret.make_cache(model, budget=32)
    mlx_kvret.generate(model, tokenizer, "remember Ada amber the", cache=cache, max_tokens=1)
    assert cache.seen == 6  # <s>, four words and the generated one
    assert mlx_kvret.generate(model, tokenizer, "recall Ada", cache=cache, max_tokens=2).split() == ["amber"]
    assert cache.seen == 10


@pytest.mark.parametrize("ids", [[3], prompt(50), mx.array(prompt(50))], ids=["one token", "list", "array"])
def test_token_ids_without_a_tokenizer(ids):
    assert len(mlx_kvret.generate(gated(), None, ids, budget=8, max_tokens=6).split()) == 6


def test_sampling_and_processors_are_mlx_lm_s():
    model = gated()
    options = {
        "budget": 8,
        "max_tokens": 6,
        "logits_processors": [lambda _, logits: logits.at[:, 7].add(1e4)],
    }
    assert mlx_kvret.generate(model, None, prompt(30), **options).split() == ["7"] * 6
    always = {"budget": 8, "max_tokens": 3, "sampler": lambda logprobs: mx.array([9])}
    assert mlx_kvret.generate(model, None, prompt(30), **always).split() == ["9"] * 3


@pytest.mark.parametrize("budget,entries", [(1, 4), ("1", 4), (10**5, 120), ("100MB", 120)])
def test_budgets_that_work(budget, entries):
    model = gated()
    cache = mlx_kvret.make_cache(model, budget=budget, buffer=0)
    forward(model, prompt(30), cache)
    assert cache.entries == entries and cache.seen == 30


def test_a_budget_as_memory_is_kept():
    model = gated()
    cache = mlx_kvret.make_cache(model, budget="20KB")
    for start in range(6):
        forward(model, prompt(50, start), cache)
    assert cache.shared.config.budget > 32 and cache.nbytes <= 20_000


WRONG = [
    ({"budget": 0}, "budget is 0"),
    ({"budget": -3}, "budget is -3"),
    ({"budget": "lots"}, "neither tokens"),
    ({"budget": "100B"}, "too small"),
    ({"budget": 10**9}, "are free; at most a budget of"),
    ({"budget": 4, "buffer": -1}, "buffer is -1"),
    ({"budget": 4, "scope": "galaxy"}, "scope is 'galaxy'"),
    ({"budget": 4, "policy": "best"}, "policy is 'best'"),
    ({"budget": 4, "min_per_head": 5}, "min_per_head is 5"),
    ({"budget": 4, "window": 3, "sinks": 2}, "lower them or raise the budget"),
    ({"budget": 4, "threshold": 0.0}, "threshold is 0"),
    ({"budget": 4, "lookahead": 0}, "lookahead is 0"),
    ({"budget": 4, "policy": "recent", "lookahead": 3}, "learned scores"),
]


@pytest.mark.parametrize("options,reason", WRONG, ids=[reason for _, reason in WRONG])
def test_eviction_options_that_cannot_work(options, reason):
    with pytest.raises(ConfigError, match=reason):
        mlx_kvret.make_cache(gated(), **options)


def test_prompts_and_options_that_cannot_work():
    model = gated()
    cache = mlx_kvret.make_cache(model, budget=8)
    for arguments, options, reason in (
        (("",), {}, "no tokenizer"),
        (([],), {}, "empty"),
        ((mx.array([], mx.int32),), {}, "empty"),
        (([1],), {"max_tokens": 0}, "max_tokens is 0"),
        (([1],), {"max_tokens": -2}, "max_tokens is -2"),
        (([1],), {"budget": 0}, "budget is 0"),
        (([1],), {"cache": cache, "budget": 4}, "budget"),
    ):
        with pytest.raises(ConfigError, match=reason):
            mlx_kvret.generate(model, None, *arguments, **options)
    demo_model, tokenizer = mlx_kvret.load("demo")
    with pytest.raises(ModelMismatchError, match="another model"):
        mlx_kvret.generate(demo_model, tokenizer, "the", cache=cache)


def test_the_learned_policy_needs_gates():
    model = mlx_kvret.attach(tiny())
    for call in (mlx_kvret.make_cache, lambda m: m.make_cache(), lambda m: mlx_kvret.generate(m, None, [1])):
        with pytest.raises(ConfigError, match="no retention gates"):
            call(model)
    assert mlx_kvret.generate(model, None, prompt(30), budget=8, policy="recent", max_tokens=3)


def test_a_model_that_is_none():
    for nothing in (None, "demo", object()):
        with pytest.raises(ConfigError, match="expected one from"):
            mlx_kvret.make_cache(nothing)


def test_load_with_gates_without_tokenizer(folder):
    model, tokenizer = mlx_kvret.load(folder, demo.GATES)
    assert tokenizer is not None and mlx_kvret.make_cache(model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    model, tokenizer = mlx_kvret.load(folder, demo.GATES)
    assert tokenizer is None and mlx_kvret.generate(model, tokenizer, [3, 4], max_tokens=2)


def test_load_refuses_gates_of_another_model(tmp_path):
    gates = random_gates(shape_of(gated()))
    save_gates(tmp_path / "gates", gates.config, gates.tensors)
    with pytest.raises(ModelMismatchError):
        mlx_kvret.load("demo", tmp_path / "gates")
    with pytest.raises(CheckpointError):
        mlx_kvret.load("demo", demo.MODEL)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "unknown architecture": (lambda f: change(f, model_type="nobody"), UnsupportedModelError, "nobody"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), CheckpointError, "not valid JSON"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), CheckpointError, "model_type"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "safetensors"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), CheckpointError, "not a whole safetensors file"),
    "other shapes": (lambda f: change(f, hidden_size=32), CheckpointError, "shape"),
}


@pytest.mark.parametrize("damage,error,reason", DAMAGE.values(), ids=DAMAGE)
def test_model_folders_that_do_not_load(folder, damage, error, reason):
    damage(folder)
    with pytest.raises(error, match=reason) as caught:
        mlx_kvret.load(folder)
    assert isinstance(caught.value, KVRetError) and str(folder) in str(caught.value)


def test_names_that_lead_nowhere(monkeypatch, folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such-model", "nowhere", folder / "config.json"):
        with pytest.raises(ConfigError, match=str(name)):
            mlx_kvret.load(name)
    with pytest.raises(ConfigError, match="backend is 'metal'"):
        mlx_kvret.load("demo", backend="metal")
