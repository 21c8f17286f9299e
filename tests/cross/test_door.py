"""Prompts and options at the door of both backends: the same forms, the same refusals."""

from __future__ import annotations

import json
import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load as stock_load
from transformers import BatchEncoding

import mlx_kvret
from mlx_kvret import demo
from mlx_kvret.errors import CheckpointError, ConfigError, KVRetError, UnsupportedFeatureError
from mlx_kvret.evaluation.methods import parse_method

IDS = [7, 3, 90, 12, 55]
ROOM = {"budget": 16, "max_tokens": 4}
TEMPLATE = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ 'the' if add_generation_prompt }}"


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's model with a chat template."""
    path = shutil.copytree(demo.MODEL, tmp_path_factory.mktemp("door") / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def loaded(backend, folder):
    return mlx_kvret.load(folder, demo.GATES, backend=backend)


def tokens(loaded, prompt, **options):
    return [r.token for r in mlx_kvret.stream_generate(*loaded, prompt, **ROOM | options)]


@pytest.mark.parametrize(
    "form",
    [tuple, np.array, torch.tensor, mx.array, lambda i: np.array([i]), lambda i: torch.tensor([i]),
     lambda i: mx.array([i]), lambda i: [i], lambda i: BatchEncoding({"input_ids": i}),
     lambda i: BatchEncoding({"input_ids": [i], "attention_mask": [[1] * 5]}, tensor_type="pt"),
     lambda i: list(torch.tensor(i)), lambda i: list(mx.array(i))],
)  # fmt: skip
def test_every_form_of_ids_means_the_same(loaded, form):
    assert tokens(loaded, form(IDS)) == tokens(loaded, IDS)


def test_messages_and_what_the_template_returns(loaded):
    messages = [{"role": "user", "content": "recall Ada"}]
    rendered = loaded[1].apply_chat_template(messages, add_generation_prompt=True)
    ids = loaded[1].encode("recall Ada the", add_special_tokens=False)
    assert tokens(loaded, messages) == tokens(loaded, rendered) == tokens(loaded, ids)
    cache = mlx_kvret.make_cache(loaded[0], 16)
    assert list(mlx_kvret.stream_generate(*loaded, messages, cache=cache, max_tokens=1))
    with pytest.raises(ConfigError, match="begin a conversation"):
        mlx_kvret.generate(*loaded, messages, cache=cache)


BAD_PROMPTS = {
    "outside": [1, 10**6],
    "just outside": [198],
    "negative": [1, -5],
    "huge": [2**70],
    "float tensor": torch.ones(3),
    "bool array": mx.array([True]),
    "two rows": mx.array([[1], [2]]),
    "empty": torch.zeros(1, 0, dtype=torch.long),
    "without content": torch.ones(3, dtype=torch.long, device="meta"),
    "none": None,
    "bytes": b"the",
    "ragged": [1, [2]],
    "padded": BatchEncoding({"input_ids": [[0, 1]], "attention_mask": [[0, 1]]}),
    "path": demo.STORY,
}


@pytest.mark.parametrize("prompt", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_everything_else_is_refused_before_anything_runs(loaded, prompt):
    cache = mlx_kvret.make_cache(loaded[0], 16)
    with pytest.raises(ConfigError, match="the prompt"):
        mlx_kvret.stream_generate(*loaded, prompt, cache=cache)
    assert cache.seen == 0


def test_the_last_row_of_the_embedding_is_a_token(loaded):
    assert tokens(loaded, [0, 197])


GENERATION = {
    "bugdet": (5, "did you mean budget"),
    "max_token": (5, "did you mean max_tokens"),
    "temperature": (1.0, "did you mean temp"),
    "topp": (0.5, "did you mean top_p"),
    "prefill_step": (5, "did you mean prefill_step_size"),
    "temp": (float("nan"), "temp is nan"),
    "top_p": (2, "top_p is 2"),
    "seed": (3, "seed has no effect"),
    "max_tokens": (2.5, "max_tokens is 2.5"),
    "prefill_step_size": (0, "prefill_step_size is 0"),
    "sampler": ("greedy", "sampler is 'greedy'"),
    "logits_processors": (len, "logits_processors is"),
    "lookahead": (10**30, "lookahead is"),
    "budget": (True, "budget True"),
    "buffer": (False, "buffer is False"),
    "policy_seed": (4, "draws nothing"),
    "num_draft_tokens": (2, "generate has no option num_draft_tokens here"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_options_that_cannot_work(loaded, name):
    value, says = GENERATION[name]
    with pytest.raises(ConfigError, match=says):
        mlx_kvret.stream_generate(*loaded, IDS, **{name: value})


@pytest.mark.parametrize(
    "budget", [10**9, 10**30, "10000 GB", "999999999GiB", "-5", "0", "nan", "1e400", 2.0]
)
def test_budgets_beyond_the_machine_or_none(loaded, budget):
    for call in (mlx_kvret.make_cache, lambda m, b: mlx_kvret.generate(m, None, IDS, budget=b)):
        with pytest.raises(ConfigError, match="budget"):
            call(loaded[0], budget)


def test_names_are_checked_everywhere(loaded, backend):
    for call in (
        lambda: mlx_kvret.make_cache(loaded[0], windw=3),
        lambda: mlx_kvret.load("demo", backend=backend, windw=3, revison="x"),
        lambda: parse_method("recent:windw=3"),
    ):
        with pytest.raises(ConfigError, match=r"windw'; (did you mean window\?|there are)"):
            call()
    with pytest.raises(ConfigError, match="twice"):
        parse_method("recent:window=3,window=4")


def test_draws_repeat_with_a_seed_and_differ_without(loaded):
    drawn = {seed: tokens(loaded, IDS, temp=9.0, seed=seed, max_tokens=12) for seed in (1, 2)}
    assert drawn[1] == tokens(loaded, IDS, temp=9.0, seed=1, max_tokens=12) != drawn[2]
    assert tokens(loaded, IDS, temp=1e-30) == tokens(loaded, IDS)
    # the likeliest alone has this much probability
    assert tokens(loaded, IDS, temp=1.0, top_p=0.001, seed=1) == tokens(loaded, IDS)


LOADING: dict[str, tuple[dict[str, Any], str | dict[str, str]]] = {
    "misspelt": ({"trust_remote_cod": True}, r"did you mean trust_remote_code\?"),
    "revision of a folder": ({"revision": "v2"}, "revision v2 is of a hub repository"),
    "revision of gates": ({"gates_revision": "v2"}, "gates_revision is given, and no gates from the hub"),
    "no text": ({"revision": 2}, "revision is 2; expected the name of a branch"),
    "no switch": ({"trust_remote_code": "no"}, "trust_remote_code is 'no'; expected true or false"),
    "no dictionary": ({"tokenizer_config": "x"}, "tokenizer_config is 'x'; expected a dictionary"),
    "device": ({"device": "nowhere"}, {"mlx": "call mx.set_default_device", "torch": "unknown to torch"}),
    "dtype": ({"dtype": "float31"}, {"mlx": "the type a model was saved in", "torch": "dtype is 'float31'"}),
    "lazy": ({"lazy": 1}, {"mlx": "lazy is 1", "torch": "lazy here: it is of mlx-lm"}),
    "strict": ({"strict": "no"}, {"mlx": "strict is 'no'", "torch": "missing weights are always refused"}),
    "adapter": ({"adapter_path": "no-such"}, {"mlx": "no folder no-such", "torch": "merge one of PEFT"}),
    "map": ({"device_map": "cpu", "device": "cpu"}, {"mlx": "no option device", "torch": "give one of them"}),
}


@pytest.mark.parametrize("case", LOADING)
def test_loader_options_that_cannot_work(backend, case):
    options, says = LOADING[case]
    with pytest.raises(ConfigError, match=says if isinstance(says, str) else says[backend]):
        mlx_kvret.load("demo", backend=backend, **options)


def test_options_of_the_tokenizer_reach_it(backend, tmp_path):
    assert (
        mlx_kvret.load("demo", backend=backend, tokenizer_config={"eos_token": "the"})[1].eos_token == "the"
    )
    for file in ("config.json", "model.safetensors"):
        shutil.copy(demo.MODEL / file, tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer; drop it"):
        mlx_kvret.load(tmp_path, backend=backend, tokenizer_config={"eos_token": "the"})


def test_weights_that_are_missing_are_not_made_up(backend, tmp_path):
    shutil.copytree(demo.MODEL, tmp_path, dirs_exist_ok=True)
    weights = mx.load(str(demo.MODEL / "model.safetensors"))
    weights.pop(next(name for name in weights if "mlp.up_proj" in name))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "pt"})
    with pytest.raises(KVRetError, match="up_proj"):
        mlx_kvret.load(tmp_path, backend=backend)


def code_folder(tmp_path, backend):
    """A model folder whose code leaves a mark when it runs."""
    shutil.copytree(demo.MODEL, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    mark = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    if backend == "mlx":
        config["model_file"] = "code.py"
        mark += "from mlx_lm.models.qwen3 import Model, ModelArgs\n"
    else:
        config["model_type"] = "made_up"
        config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        mark += (
            "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
            "class Config(Qwen3Config):\n    model_type = 'made_up'\n"
            "class Model(Qwen3ForCausalLM):\n    config_class = Config\n"
        )
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(mark)
    return tmp_path / "model", tmp_path / "ran"


def test_code_of_a_folder_runs_only_if_that_is_said(backend, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = code_folder(tmp_path, backend)
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(KVRetError, match="trust_remote_code"):
            mlx_kvret.load(folder, backend=backend, **options)
        assert not ran.exists()
    model, _ = mlx_kvret.load(folder, demo.GATES, backend=backend, trust_remote_code=True)
    assert ran.exists() and mlx_kvret.generate(model, None, IDS, **ROOM)


# ---------------------------------------------------------------- adapters of mlx-lm


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter with random weights for the demo's model."""
    path = tmp_path_factory.mktemp("adapter")
    settings = {"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 5.0, "dropout": 0.0}}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    model, _ = stock_load(str(demo.MODEL))
    model.freeze()
    linear_to_lora_layers(model, settings["num_layers"], settings["lora_parameters"])
    mx.random.seed(0)
    found = {name: mx.random.normal(w.shape) for name, w in tree_flatten(model.trainable_parameters())}
    mx.save_safetensors(str(path / "adapters.safetensors"), found)
    return path


def test_an_adapter_does_what_it_does_in_mlx_lm(adapter):
    model, _ = mlx_kvret.load("demo", backend="mlx", adapter_path=adapter)
    stock, _ = stock_load(str(demo.MODEL), adapter_path=str(adapter))
    plain, _ = mlx_kvret.load("demo", backend="mlx")
    ids = mx.array([IDS])
    ours = model(ids, cache=mlx_kvret.make_cache(model, 64, policy="recent"))
    assert mx.array_equal(ours, stock(ids)) and not mx.array_equal(ours, plain(ids))


def damaged(adapter, tmp_path, change):
    path = shutil.copytree(adapter, tmp_path / "adapter")
    change(path)
    return path


def edited(path, change):
    weights = dict(mx.load(str(path / "adapters.safetensors")))
    change(weights)
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)


DAMAGE = {
    "no weights": (lambda p: (p / "adapters.safetensors").unlink(), "holds no adapter of mlx-lm"),
    "of PEFT": (
        lambda p: (p / "adapters.safetensors").rename(p / "adapter_model.safetensors"),
        "one of PEFT must be merged",
    ),
    "a list": (lambda p: (p / "adapter_config.json").write_text("[]"), "does not go on this model"),
    "empty": (lambda p: (p / "adapter_config.json").write_text("{}"), "does not go on this model"),
    "cut": (
        lambda p: (p / "adapters.safetensors").write_bytes((p / "adapters.safetensors").read_bytes()[:99]),
        "does not go on this model",
    ),
    "another name": (
        lambda p: edited(p, lambda w: w.update({"model.layers.9.x.lora_a": mx.ones((2, 2))})),
        "does not go on this model",
    ),
    "incomplete": (lambda p: edited(p, lambda w: w.pop(min(w))), "lacks 1 tensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_an_adapter_that_is_damaged_or_of_another_model(adapter, tmp_path, case):
    change, says = DAMAGE[case]
    with pytest.raises(CheckpointError, match=says):
        mlx_kvret.load("demo", backend="mlx", adapter_path=damaged(adapter, tmp_path, change))


def test_options_that_only_mlx_lm_s_own_caches_take(loaded, backend):
    error = UnsupportedFeatureError if backend == "mlx" else ConfigError
    for name in ("kv_group_size", "max_kv_size", "prompt_cache"):
        with pytest.raises(error, match=name):
            mlx_kvret.generate(*loaded, IDS, **{name: 4})
