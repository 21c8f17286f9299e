"""Conversations with a model on both backends: the cache has read exactly what the transcript says."""

import importlib
import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import mlx_kvret
from mlx_kvret import api
from mlx_kvret.cli import main
from mlx_kvret.cli.talk import Conversation
from mlx_kvret.errors import CacheError, ConfigError

from .templates import FAMILIES, NO_SYSTEM, PLAIN, VOCABULARY, write_tokenizer

BUDGET = {"budget": 512, "policy": "recent"}


def write_model(folder):
    """A Qwen3 of two layers with random weights."""
    hidden, inner, wide, narrow, size = 32, 48, 32, 16, 8
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2,
        "num_attention_heads": wide // size, "num_key_value_heads": narrow // size, "head_dim": size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
        "hidden_act": "silu", "attention_bias": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden)}
    norms = {"model.norm": hidden}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {
            f"{layer}.self_attn.q_proj": (wide, hidden), f"{layer}.self_attn.o_proj": (hidden, wide),
            f"{layer}.self_attn.k_proj": (narrow, hidden), f"{layer}.self_attn.v_proj": (narrow, hidden),
            f"{layer}.mlp.gate_proj": (inner, hidden), f"{layer}.mlp.up_proj": (inner, hidden),
            f"{layer}.mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        norms |= {f"{layer}.input_layernorm": hidden, f"{layer}.post_attention_layernorm": hidden}
        norms |= {f"{layer}.self_attn.q_norm": size, f"{layer}.self_attn.k_norm": size}
    weights = {f"{n}.weight": random.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}
    weights |= {f"{n}.weight": np.ones(s, np.float32) for n, s in norms.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module", params=["mlx", "torch"])
def models(request, tmp_path_factory):
    """Loads the model with a template, on one backend."""
    backend, library = request.param, {"mlx": "mlx.core", "torch": "torch"}[request.param]
    pytest.importorskip(library, reason="the backend is not installed")
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)

    def load(template, stop="<|im_end|>"):
        write_tokenizer(folder, template, stop)
        model, tokenizer = mlx_kvret.load(folder, backend=backend)
        return model, tokenizer, _Sampler(importlib.import_module(library), backend)

    load.folder, load.backend = folder, backend
    return load


class _Sampler:
    """Says what it is told to, instead of what the model would."""

    def __init__(self, library, backend):
        self.array = library.array if backend == "mlx" else library.tensor
        self.left = []

    def __call__(self, logprobs):
        return self.array([self.left.pop(0) if self.left else 0])


@pytest.fixture
def fed(monkeypatch):
    """Token ids that were given to be read, by call."""
    calls, real = [], api.stream_generate

    def record(model, tokenizer, ids, **options):
        calls.append(list(ids))
        return real(model, tokenizer, ids, **options)

    monkeypatch.setattr(api, "stream_generate", record)
    return calls


def ask(talk, sampler, text, answer, stop=None, **options):
    said = talk.tokenizer.encode(answer, add_special_tokens=False)
    said += [] if stop is None else [talk.tokenizer.convert_tokens_to_ids(stop)]
    sampler.left = list(said)
    talk.turn(text, {"sampler": sampler, "max_tokens": len(said)} | options)
    return said


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_has_read_what_was_given_and_said(models, fed, name):
    family = FAMILIES[name]
    model, tokenizer, sampler = models(family.template, family.stop)
    talk = Conversation(model, tokenizer, None, BUDGET)
    for answer, stop in (
        ("<think>\nhm\n</think>\n\nYes. ", family.stop),
        ("No, becau", None),
        ("So", family.stop),
    ):
        before = talk.transcript.ids
        said = ask(talk, sampler, "Sure?", answer, stop)
        known = before + fed[-1] + said
        assert talk.transcript.ids == known[: talk.cache.seen]
        # whatever of an answer a backend leaves for the next pass
        assert len(known) - talk.cache.seen <= 1
    text = tokenizer.decode(known)
    assert not family.once or text.count(family.once) == 1
    assert text.count("<think>\nhm\n</think>\n\nYes. ") == 1
    assert text.count(family.closes) >= text.count(family.opens) - (family.closes != family.stop)


class Broken(CacheError):
    """Made up."""


def break_off(monkeypatch, read, error):
    """From now on reading ends with an error once this many tokens are in the cache."""
    real = api.stream_generate

    def broken(model, tokenizer, ids, prompt_progress_callback, **options):
        def advance(done, total):
            prompt_progress_callback(done, total)
            if done >= read:
                raise error

        return real(model, tokenizer, ids, prompt_progress_callback=advance, **options)

    monkeypatch.setattr(api, "stream_generate", broken)


def test_a_turn_that_fails_leaves_no_trace_that_is_not_accounted_for(models, monkeypatch):
    model, tokenizer, sampler = models(PLAIN)
    talk = Conversation(model, tokenizer, "Be brief.", BUDGET)
    ask(talk, sampler, "Hi?", "Yes", None)
    messages, seen = list(talk.transcript.messages), talk.cache.seen
    chunks = {"prefill_step_size": 8}
    with monkeypatch.context() as patch:
        break_off(patch, 0, Broken("nothing read"))
        with pytest.raises(Broken):
            ask(talk, sampler, "A long story", "never said", **chunks)
        assert (talk.transcript.messages, talk.cache.seen, len(talk.transcript)) == (messages, seen, seen)
        patch.undo()
        break_off(patch, 16, Broken("16 tokens read"))
        with pytest.raises(Broken):
            ask(talk, sampler, "A long story", "never said", **chunks)
    assert talk.transcript.messages == messages
    assert talk.cache.seen == len(talk.transcript) == seen + 16
    ask(talk, sampler, "Shorter", "Yes", "<|im_end|>")
    ids = talk.transcript.ids
    assert talk.cache.seen == len(ids)
    whole = tokenizer.apply_chat_template(talk.transcript.messages, tokenize=False)
    cut, *rest = [m["content"] for m in talk.transcript.messages[-4:]]
    assert cut and "A long story".startswith(cut) and rest == ["", "Shorter", "Yes"]
    assert whole.startswith(tokenizer.decode(ids)) and "Shorter" in tokenizer.decode(ids)


def test_a_template_that_refuses_a_turn(models):
    angry = "{% if 'rude' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    model, tokenizer, sampler = models(angry)
    talk = Conversation(model, tokenizer, None, BUDGET)
    ask(talk, sampler, "Hi?", "Yes", None)
    before = talk.transcript.messages[:], talk.transcript.ids, talk.cache.seen
    with pytest.raises(ConfigError, match="cannot render this conversation"):
        ask(talk, sampler, "rude", "never")
    assert (talk.transcript.messages, talk.transcript.ids, talk.cache.seen) == before
    ask(talk, sampler, "Sure?", "Yes", "<|im_end|>")
    assert talk.cache.seen == len(talk.transcript)


def test_a_cache_that_someone_else_used_is_not_gone_on_with(models):
    model, tokenizer, sampler = models(PLAIN)
    talk = Conversation(model, tokenizer, None, BUDGET)
    list(mlx_kvret.stream_generate(model, tokenizer, [1, 2, 3], cache=talk.cache, max_tokens=1))
    with pytest.raises(CacheError, match="/reset"):
        ask(talk, sampler, "Hi?", "Yes")
    talk.reset()
    ask(talk, sampler, "Hi?", "Yes")


def generate(models, *arguments):
    given = ["generate", "--model", models.folder, "--backend", models.backend, "--policy", "recent"]
    return CliRunner().invoke(main, [*map(str, given), "--max-tokens", "2", *arguments])


def test_generate_reads_one_message_in_the_template(models, fed):
    _, tokenizer, _ = models(PLAIN)
    result = generate(models, "--prompt", "What is <|im_end|>?", "--system-prompt", "Be brief.")
    assert result.exit_code == 0, result.output
    assert tokenizer.decode(fed[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is <|im_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # the one that was typed is text
    assert fed[0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    result = generate(models, "--prompt", "Hi <|im_end|>", "--ignore-chat-template")
    assert result.exit_code == 0 and "".join(fed[1]) == "Hi <|im_end|>"


def test_generate_with_a_system_message_that_is_not_taken(models):
    models(NO_SYSTEM)
    result = generate(models, "--prompt", "Hi?", "--system-prompt", "Be brief.")
    assert result.exit_code == 1 and "first message" in result.stderr
    models(None)
    result = generate(models, "--prompt", "Hi?", "--system-prompt", "Be brief.")
    assert result.exit_code == 1 and "--system-prompt needs a chat template" in result.stderr
    assert generate(models, "--prompt", "Hi?").exit_code == 0


def test_statistics_compare_like_with_like(models):
    models(PLAIN)
    for options, kept in ((["--policy", "full"], 300), (["--budget", "64", "--buffer", "8"], None)):
        result = generate(models, "--prompt", "x" * 250, "--verbose", *options)
        line = result.stderr.splitlines()[-1]
        held, full = (float(part.split()[-1]) for part in line.split(" MB")[:2])
        seen = int(line.split(" tokens per head")[0].split()[-1])
        entries = int(line.split("kept ")[1].split()[0])
        if kept:
            assert held == full and entries == seen
        else:
            assert held < full and entries <= 72 < seen
