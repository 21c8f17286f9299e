"""Model folders that are damaged, lie, or bring code: one clear error, in every reader of both backends."""

import contextlib
import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

import mlx_kvret
from mlx_kvret.core.model_folder import model_config
from mlx_kvret.core.tensors import read_file, write_tensors
from mlx_kvret.demo import MODEL
from mlx_kvret.errors import CheckpointError, KVRetError, UnsupportedModelError
from mlx_kvret.training.run import Base

BACKENDS = ("mlx", "torch")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


def config(**changes):
    def edit(folder):
        old = json.loads((folder / "config.json").read_text())
        new = {name: value for name, value in (old | changes).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(new))

    return edit


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def cut(name):
    def edit(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def weights(edit):
    def change(folder):
        tensors, metadata = read_file(folder / "model.safetensors")
        write_tensors(folder / "model.safetensors", edit(tensors), metadata)

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


DAMAGE = {
    "a list": text("config.json", "[1, 2]"),
    "a number": text("config.json", "3"),
    "empty": text("config.json", ""),
    "cut": cut("config.json"),
    "deep": text("config.json", '{"a": ' * 5000 + "1" + "}" * 5000),
    "digits": text("config.json", '{"num_hidden_layers": ' + "9" * 400 + "}"),
    "no config": without("config.json"),
    "a billion layers": config(num_hidden_layers=10**9),
    "more layers than weights": config(num_hidden_layers=3000),
    "fewer layers": config(num_hidden_layers=-1),
    "layers as text": config(num_hidden_layers="3"),
    "layers as list": config(num_hidden_layers=[3]),
    "no heads": config(num_attention_heads=0),
    "heads": config(num_key_value_heads=10**9),
    "rope as list": config(rope_parameters=[1]),
    "hidden size": config(hidden_size=10**6),
    "vocabulary": config(vocab_size=10**9),
    "width as object": config(intermediate_size={}),
    "no type": config(model_type=...),
    "type": config(model_type=["llama"]),
    "unknown type": config(model_type="unheard_of"),
    "text_config": config(text_config={"num_hidden_layers": 10**9}),
    "half the weights": cut("model.safetensors"),
    "no weights": without("model.safetensors"),
    "missing weights": weights(lambda tensors: dict(list(tensors.items())[2:])),
    "header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
}
TOKENIZER = {
    "half": cut("tokenizer.json"),
    "a list": text("tokenizer.json", "[]"),
    "config": text("tokenizer_config.json", "[1]"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_one_clear_error(folder, backend, damage):
    damage(folder)
    with pytest.raises((CheckpointError, UnsupportedModelError), match="model"):
        mlx_kvret.load(folder, backend=backend)
    # training, conversion and evaluation begin with this
    with contextlib.suppress(KVRetError):
        Base.find(folder)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", TOKENIZER.values(), ids=TOKENIZER)
def test_a_damaged_tokenizer_is_one_clear_error(folder, backend, damage):
    damage(folder)
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded"):
        mlx_kvret.load(folder, backend=backend)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("no weights",)])
def test_what_a_budget_costs_is_not_told_of_a_damaged_model(folder, damage):
    from mlx_kvret.cuda_backend.api import cache_shape as on_torch
    from mlx_kvret.mlx_backend.api import cache_shape as on_mlx

    DAMAGE[damage](folder)
    for cache_shape in (on_mlx, on_torch):
        # nothing of the weights is needed on torch
        with contextlib.suppress(KVRetError):
            cache_shape(folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_code_in_a_folder_is_not_run_whatever_is_typed(folder, backend, monkeypatch):
    """transformers asks on standard input, so that a prompt piped in would answer."""
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Config: ...\n")
    config(
        model_type="own",
        model_file="own.py",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Config"},
    )(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(KVRetError):
        mlx_kvret.load(folder, backend=backend)
    assert not (folder / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9


def test_infinity_may_stand_in_a_config(folder):
    """As in published ones of Mamba hybrids."""
    config(time_step_limit=[0.0, float("inf")])(folder)
    assert model_config(folder)["time_step_limit"][1] == float("inf")


class Broken:
    """A tokenizer that fails in use; what goes wrong in Rust is no Exception."""

    bos_token = bos_token_id = None
    chat_template = "{{ messages }}"

    def __init__(self, error):
        self.error = error

    def encode(self, *_, **__):
        raise self.error

    __call__ = encode

    def apply_chat_template(self, *_, **__):
        return "text"


PanicException = type("PanicException", (BaseException,), {})


@pytest.mark.parametrize(
    "error", [PanicException("no entry found for key"), KeyError("a"), TypeError("list")]
)
def test_a_tokenizer_that_fails_in_use_is_one_clear_error(error):
    from mlx_kvret.core.prompts import prompt_ids
    from mlx_kvret.evaluation.writer import Writer
    from mlx_kvret.training.documents import document
    from mlx_kvret.training.records import Record

    tokenizer = Broken(error)
    for use in (
        lambda: prompt_ids(tokenizer, "text", True),
        lambda: Writer.encode(SimpleNamespace(_tokenizer=tokenizer), "text"),
        lambda: document(Record("a:1", text="text"), tokenizer, "all"),
        lambda: document(Record("a:1", messages=[{"role": "user", "content": "a"}]), tokenizer, "all"),
    ):
        with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded or used"):
            use()


def test_an_interrupt_is_no_error_of_a_tokenizer():
    from mlx_kvret.core.prompts import prompt_ids

    with pytest.raises(KeyboardInterrupt):
        prompt_ids(Broken(KeyboardInterrupt()), "text", True)
