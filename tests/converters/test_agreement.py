"""Agreement of kept sets, on inputs of a prompt as its model sees it and on synthetic ones."""

import json
import shutil
from collections import defaultdict

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import gemma3_text

from mlx_kvret import attach, demo
from mlx_kvret.converters import convert, load_any
from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.errors import CheckpointError, ConfigError, ModelMismatchError, UnsupportedModelError
from mlx_kvret.evaluation.gate_agreement import agreement, synthetic_inputs
from mlx_kvret.evaluation.gate_inputs import attention_inputs, prompt_inputs
from mlx_kvret.mlx_backend.gates import RetentionGates, from_checkpoint


def gates(kind="rg10", seed=0, **fields):
    """Random gates whose β vary from token to token."""
    mx.random.seed(seed)
    shape = {"layers": 3, "kv_heads": 2, "hidden_size": 32, "width": 16} | fields
    return RetentionGates(GateConfig(kind, **shape))


def naive_share(reference, other, inputs, budget, scope):
    """Sorting tuples in plain Python, best first."""
    kept = []
    for both in (reference, other):
        groups = defaultdict(list)
        for layer, x in inputs:
            for position, row in enumerate(np.array(both.log_beta(layer, mx.array(x)))):
                for head, log_beta in enumerate(row):
                    age = np.float32(len(x) + 1 - position)
                    entry = (-(age * log_beta), -position, layer, head)
                    groups[0 if scope == "global" else (layer, head)].append(entry)
        share = budget * (len(inputs) * len(row) if scope == "global" else 1)
        kept.append({entry[1:] for group in groups.values() for entry in sorted(group)[:share]})
    return len(kept[0] & kept[1]) / len(kept[0])


@pytest.mark.parametrize(("kind", "scope"), [("rg10", "global"), ("rg", "head")])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_agreement_is_that_of_sorted_tuples(kind, scope, tokens):
    reference, other = gates(kind), gates(kind, seed=1)
    inputs = list(synthetic_inputs(reference.config, tokens))
    found = agreement(reference, other, inputs, "test")
    assert (found.tokens, found.scope) == (tokens, scope)
    assert set(found.shares) == {max(1, tokens // 2), max(1, tokens // 4), max(1, tokens // 8)}
    for budget, share in found.shares.items():
        assert share == pytest.approx(naive_share(reference, other, inputs, budget, scope), abs=1e-12)
    if tokens == 40:
        assert min(found.shares.values()) < 1


def test_equal_gates_agree_wholly():
    assert set(agreement(gates(), gates(), synthetic_inputs(gates().config), "test").shares.values()) == {1.0}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "inputs of \\[\\] tokens"),
        ([(0, np.zeros((0, 32)))], "at least one token"),
        ([(0, np.zeros((4, 32))), (1, np.zeros((5, 32)))], "as many for each layer"),
        ([(0, np.zeros((4, 31)))], r"shape \(4, 31\); expected \(tokens, 32\)"),
        ([(0, np.zeros(32))], "expected \\(tokens, 32\\)"),
    ],
)
def test_inputs_that_do_not_fit(inputs, says):
    with pytest.raises(ConfigError, match=says):
        agreement(gates(), gates(), inputs, "test")


def test_synthetic_inputs_are_normalised_and_repeatable():
    once, again = (list(synthetic_inputs(gates().config, 9)) for _ in range(2))
    assert [layer for layer, _ in once] == [0, 1, 2]
    for (_, x), (_, y) in zip(once, again, strict=True):
        assert x.shape == (9, 32) and x.dtype == np.float32 and (x == y).all()
        np.testing.assert_allclose((x * x).mean(1), 1, rtol=1e-5)


def test_prompt_inputs_are_those_of_the_models_layers():
    text = " ".join(demo.STORY.read_text().split()[:50])
    found = prompt_inputs(demo.MODEL, from_checkpoint(load_gates(demo.GATES)), text)
    model, tokenizer = mlx_lm.load(str(demo.MODEL))
    hidden = model.model.embed_tokens(mx.array([tokenizer.encode(text)]))
    assert sorted(found) == [0, 1, 2] and found[0].shape == (51, 64)
    for index, layer in enumerate(model.layers):
        np.testing.assert_allclose(found[index], layer.input_layernorm(hidden)[0], rtol=1e-4, atol=1e-5)
        hidden = layer(hidden, "causal")


@pytest.mark.parametrize("count", [4, 2])
def test_prompt_inputs_of_a_hybrid_are_those_of_its_global_layers(monkeypatch, count):
    """Gates may exist for all layers, or only for those whose entries compete."""
    mx.random.seed(0)
    model = gemma3_text.Model(
        gemma3_text.ModelArgs(
            "gemma3_text", 32, 4, 32, 2, 16, vocab_size=11, num_key_value_heads=1, sliding_window_pattern=2
        )
    )
    tokens, inputs = [3, 1, 4, 1, 5, 9], []
    stock = gemma3_text.Attention.__call__
    monkeypatch.setattr(
        gemma3_text.Attention, "__call__", lambda self, x, *rest: inputs.append(x[0]) or stock(self, x, *rest)
    )
    model(mx.array([tokens]))
    monkeypatch.undo()

    found = attention_inputs(attach(model), gates(layers=count, kv_heads=1), tokens)
    assert list(found) == ([1, 3] if count == 4 else [0, 1])
    for x, layer in zip(found.values(), (1, 3), strict=True):
        np.testing.assert_allclose(x, inputs[layer], rtol=1e-5, atol=1e-6)


def test_prompt_inputs_need_a_model_that_fits(tmp_path):
    source = from_checkpoint(load_gates(demo.GATES))
    # the demo's tokenizer puts <s> before every text; without it an empty one has no tokens
    bare = shutil.copytree(demo.MODEL, tmp_path / "bare")
    tokenizer = json.loads((bare / "tokenizer.json").read_text()) | {"post_processor": None}
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="the prompt is empty"):
        prompt_inputs(bare, source, "")
    with pytest.raises(ModelMismatchError, match="hidden size 32, the model has 64"):
        prompt_inputs(demo.MODEL, gates())
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        prompt_inputs(tmp_path, source)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(demo.MODEL, tmp_path / "model")


def test_report_is_on_a_prompt_when_the_model_is_at_hand(tmp_path, model):
    done = convert(demo.GATES, tmp_path / "bf16", "mlx", dtype="bfloat16", model=model)
    source, rounded = (from_checkpoint(load_any(folder)) for folder in (demo.GATES, tmp_path / "bf16"))
    inputs = prompt_inputs(model, source).items()
    assert done.agreement == agreement(source, rounded, inputs, f"a prompt in {model}")
    assert done.agreement.tokens == 1024
    assert "budget   128" in str(done) and f"a prompt in {model}" in str(done)


def test_report_on_a_given_prompt(tmp_path, model):
    text = " ".join(demo.STORY.read_text().split()[:99])
    done = convert(demo.GATES, tmp_path / "8bit", "mlx", bits=8, model=model, prompt=text)
    assert done.agreement.tokens == 100 and list(done.agreement.shares) == [50, 25, 12]


def test_report_without_a_model_says_so(tmp_path):
    done = convert(demo.GATES, tmp_path / "8bit", "mlx", bits=8)
    assert "synthetic inputs, no prompt: no base model was given" in str(done)
    assert 0.5 < done.agreement.shares[64] < 1


@pytest.mark.parametrize(
    ("lacks", "why"),
    [("model.safetensors", "holds no model"), ("tokenizer*", "no tokenizer"), (None, "Model type odd")],
)
def test_report_without_a_prompt_says_why(tmp_path, model, lacks, why):
    for file in model.glob(lacks or "nothing"):
        file.unlink()
    if lacks is None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "odd"}))
    done = convert(demo.GATES, tmp_path / "bf16", "shared", dtype="bfloat16", model=model)
    assert done.agreement.inputs.startswith("synthetic inputs, no prompt") and why in done.agreement.inputs
    # a prompt that was asked for is not dropped
    with pytest.raises((CheckpointError, ConfigError, UnsupportedModelError), match=why):
        convert(demo.GATES, tmp_path / "out", "shared", dtype="bfloat16", model=model, prompt="remember Ada")
    assert not (tmp_path / "out").exists()


def test_prompt_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give its folder as model as well"):
        convert(demo.GATES, tmp_path / "out", "mlx", bits=8, prompt="remember Ada")
