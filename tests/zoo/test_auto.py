"""Gates that are known for a model are found by themselves, for it and its copies only; both backends."""

import json
import logging
import shutil

import mlx_lm
import pytest
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM

import mlx_kvret
from mlx_kvret.core.config import EvictionDefaults
from mlx_kvret.cuda_backend import hooks as torch_hooks
from mlx_kvret.errors import ConfigError
from mlx_kvret.mlx_backend import hooks as mlx_hooks
from mlx_kvret.zoo import auto, known
from zoo.bases import NAME, base, write_gates, write_model, write_quantized

BACKENDS = ("mlx", "torch")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_model(root / "base")
    write_model(root / "float32", torch.float32)
    write_model(root / "float16", torch.float16)
    write_model(root / "tuned", tuned=0.01)
    write_quantized(root / "base", root / "4bit")
    write_gates(root / "gates")
    return root


@pytest.fixture
def shipped(made, monkeypatch):
    """Gates that are shipped for the base."""
    entry = known.Entry(base(made / "base"), "tiny", "sums", made / "gates")
    monkeypatch.setattr(known, "_SHIPPED", (entry,))
    return entry


@pytest.fixture
def released(made, monkeypatch):
    """Gates on the hub for a base of which only the name is known; they are in the cache unless taken out."""
    entry = known.Entry(base(made / "base", with_norms=False), "other/Tiny-Gates", "sums")
    monkeypatch.setattr(known, "_SHIPPED", ())
    monkeypatch.setattr(known, "RELEASED", (entry,))
    monkeypatch.setattr(auto, "resolve", lambda name, what: made / "gates")
    return entry


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, "mlx_kvret")
    return caplog


def gates_of(model):
    made = (torch_hooks if isinstance(model, torch.nn.Module) else mlx_hooks).attachment(model)
    return None if made is None else made.gates


def said(log):
    (record,) = [record for record in log.records if record.name == "mlx_kvret"]
    return record.levelname, record.getMessage()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", ["base", "float32", "float16"])
def test_the_base_and_its_copies_are_known_by_their_weights(made, shipped, log, backend, folder):
    model, _ = mlx_kvret.load(made / folder, backend=backend)
    assert gates_of(model) is not None
    assert said(log) == ("INFO", f"gates: shipped as tiny, made for {NAME} on sums (by its weights)")
    assert mlx_kvret.make_cache(model, 16) is not None


def test_so_is_a_copy_in_4_bits(made, shipped, log):
    model, _ = mlx_kvret.load(made / "4bit", backend="mlx")
    assert gates_of(model) is not None and "by its weights" in said(log)[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fine_tune_is_not_taken_for_its_base(made, shipped, log, backend):
    model, _ = mlx_kvret.load(made / "tuned", backend=backend)
    assert gates_of(model) is None
    level, text = said(log)
    assert level == "WARNING" and "a fine-tune, or another version" in text and f"tiny ({NAME})" in text
    with pytest.raises(ConfigError, match="no retention gates"):
        mlx_kvret.make_cache(model, 16)
    assert mlx_kvret.make_cache(model, 16, policy="recent") is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_can_be_told_to_take_them(made, shipped, log, backend):
    model, _ = mlx_kvret.load(made / "tuned", made / "gates", backend=backend)
    assert gates_of(model) is not None and not log.records


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_means_none(made, shipped, log, backend):
    model, _ = mlx_kvret.load(made / "base", None, backend=backend)
    assert gates_of(model) is None and not log.records


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_that_others_loaded(made, shipped, log, backend):
    model = load_model(made / "base")[0] if backend == "mlx" else loaded_by_transformers(made / "base")
    assert gates_of(mlx_kvret.attach(model)) is not None and "by its weights" in said(log)[1]
    assert gates_of(mlx_kvret.attach(model, None)) is None
    mlx_kvret.detach(model)
    assert mlx_kvret.make_cache(model, 16, policy="recent") is not None and gates_of(model) is None
    mlx_kvret.detach(model)
    assert mlx_kvret.make_cache(model, 16) is not None and gates_of(model) is not None
    mlx_kvret.detach(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("models--maker--Tiny-1B-Instruct/snapshots/0123", True),
        ("models--mlx-community--Tiny-1B-Instruct-4bit/snapshots/0123", True),
        ("maker/Tiny-1B-Instruct", True),
        ("models--someone--Tiny-1B-Instruct/snapshots/0123", False),
        ("models--maker--Tiny-1B-Instruct-Medical/snapshots/0123", False),
        ("my-model", False),
    ],
)
def test_else_the_name_tells(made, released, log, tmp_path, backend, name, taken):
    shutil.copytree(made / "base", tmp_path / name)
    model, _ = mlx_kvret.load(tmp_path / name, backend=backend)
    level, text = said(log)
    assert (gates_of(model) is not None) is taken
    if taken:
        assert (level, text) == (
            "INFO",
            f"gates: from other/Tiny-Gates, made for {NAME} on sums (by its name)",
        )
    else:
        assert level == "WARNING" and f"If it is a copy, name its gates: other/Tiny-Gates ({NAME})" in text


def loaded_by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_what_transformers_loaded_has_a_name(made, released, log, tmp_path):
    folder = tmp_path / "models--maker--Tiny-1B-Instruct" / "snapshots" / "0"
    shutil.copytree(made / "base", folder)
    assert gates_of(mlx_kvret.attach(loaded_by_transformers(folder))) is not None
    # a fine-tune is saved with the name of its base
    other = tmp_path / "mine"
    shutil.copytree(made / "tuned", other)
    config = json.loads((other / "config.json").read_text()) | {"_name_or_path": NAME}
    (other / "config.json").write_text(json.dumps(config))
    assert gates_of(mlx_kvret.attach(loaded_by_transformers(other))) is None


def test_what_mlx_lm_loaded_has_none(made, released, log):
    assert gates_of(mlx_kvret.attach(load_model(made / "base")[0])) is None
    assert "nothing tells its name" in said(log)[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_offline_and_not_in_the_cache(made, released, log, monkeypatch, tmp_path, backend):
    def resolve(name, what):
        raise ConfigError("offline mode is on")

    monkeypatch.setattr(auto, "resolve", resolve)
    shutil.copytree(made / "base", tmp_path / NAME)
    model, _ = mlx_kvret.load(tmp_path / NAME, backend=backend)
    level, text = said(log)
    assert gates_of(model) is None and level == "WARNING"
    assert "offline mode is on" in text and "`mlx-kvret get other/Tiny-Gates`" in text and "recent" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_that_do_not_fit_after_all(made, released, log, monkeypatch, tmp_path, backend):
    shutil.copytree(made / "base", tmp_path / NAME)
    shutil.copytree(made / "gates", tmp_path / "gates")
    (tmp_path / "gates" / "gates.safetensors").write_bytes(b"")
    monkeypatch.setattr(auto, "resolve", lambda name, what: tmp_path / "gates")
    model, _ = mlx_kvret.load(tmp_path / NAME, backend=backend)
    assert gates_of(model) is None and log.records[-1].levelname == "WARNING"
    assert "no gates are used: Tiny-Gates cannot be" in log.records[-1].getMessage()


def test_a_model_with_an_adapter_is_another_model(made, shipped):
    subject = auto.Subject({}, (NAME,), dict, changed=True)
    assert subject.judge(shipped.base) == (False, "it was changed by an adapter")


def test_gates_revision_needs_gates_by_name(made, shipped):
    for backend in BACKENDS:
        with pytest.raises(ConfigError, match="gates_revision is given, and no gates from the hub"):
            mlx_kvret.load(made / "base", gates_revision="main", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_gates_ask_for_is_how_they_are_used(made, tmp_path, backend):
    folder = tmp_path / "gates"
    shutil.copytree(made / "gates", folder)
    content = json.loads((folder / "kvret.json").read_text())
    content["gates"]["eviction"] = EvictionDefaults(sinks=3, scope="head").to_dict()
    (folder / "kvret.json").write_text(json.dumps(content))
    model, _ = mlx_kvret.load(made / "base", folder, backend=backend)
    ids = list(range(1, 61))
    for options, sinks in (({}, 3), ({"sinks": 0}, 0)):
        cache = mlx_kvret.make_cache(model, 8, 2, **options)
        config = cache.shared.config
        assert (config.sinks, config.scope) == (sinks, "head")
        list(mlx_kvret.stream_generate(model, None, ids, cache=cache, max_tokens=1))
        if sinks:
            assert all(list(head[:3]) == [0, 1, 2] for layer in cache.kept_positions() for head in layer)
    other = mlx_kvret.make_cache(model, 8, 2, policy="recent", scope="head").shared.config
    assert other.sinks == 2  # the policy's own: min(4, budget // 4)
    if backend == "mlx":
        assert mlx_lm.models.cache.make_prompt_cache(model).shared.config.sinks == 3
