"""The diagnosis against attention weights of the stock model, and retention on both engines."""

import numpy as np
import pytest

import mlx_kvret
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.diagnostics import BINS, diagnose, dilution, retained
from mlx_kvret.evaluation.engine import PublicEngine
from mlx_kvret.evaluation.methods import parse_method
from mlx_kvret.evaluation.tasks import make_samples

torch = pytest.importorskip("torch", reason="an extra; CI installs it")


def test_mass_with_the_full_cache_is_the_stock_models_attention(reference, stock):
    samples = make_samples("facts", 192, 2, seed=1)
    found = diagnose(reference, samples, parse_method("full"), 1)
    paid = []
    for sample in samples:
        for question in sample.turns[0].questions:
            with torch.no_grad():
                ids = torch.tensor([sample.turns[0].ids + question.ids])
                weights = stock(ids, output_attentions=True).attentions
            paid.append([layer[0, :, -1, question.useful[0]].numpy() for layer in weights])
    np.testing.assert_allclose(found.mass, np.mean(paid, 0), atol=1e-4)
    assert found.found.tolist() == [[1.0, 1.0]] * 3
    np.testing.assert_allclose(found.by_position, 1.0)


def test_evicted_entries_get_no_attention_and_are_not_counted(reference):
    samples = make_samples("early", 256, 2, seed=2)
    found = diagnose(reference, samples, parse_method("recent:sinks=0"), 16)
    # all facts stand early, none of them among the newest
    assert found.mass.max() == found.found.max() == 0.0
    assert found.by_position[..., : BINS // 2].max() == 0.0
    # the last chunk may exceed the budget by less than the buffer
    assert (found.held >= 16 / 256).all() and (found.held <= 21 / 256).all()


def test_both_engines_retain_the_same(reference):
    model, tokenizer = mlx_kvret.load("demo", backend="mlx")
    public = PublicEngine(model, tokenizer, chunk=37, buffer=5)
    samples = make_samples("facts", 192, 2, seed=3)
    method = parse_method("learned")
    ours = diagnose(reference, samples, method, 12).by_position
    np.testing.assert_allclose(ours, retained(public, samples, method, 12))


def test_dilution_tells_both(reference):
    told = dilution(reference, make_samples("facts", 192, 1, seed=4), parse_method("learned"), 16)
    assert set(told) == {"method", "budget", "best_head", "full", "evicted"}
    assert np.shape(told["evicted"]["mass"]) == (3, 4)
    assert told["best_head"]["full"] > 0.5


def test_tasks_without_useful_positions_are_refused(reference):
    with pytest.raises(ConfigError, match="one-turn tasks that know the useful positions"):
        diagnose(reference, make_samples("turns", 192, 1, seed=5), parse_method("full"), 1)
