"""Both engines against each other and against the stock model."""

import numpy as np
import pytest
from rounding import assert_near

import mlx_kvret
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.engine import PublicEngine
from mlx_kvret.evaluation.likelihood import log_likelihoods
from mlx_kvret.evaluation.methods import parse_method
from mlx_kvret.evaluation.samples import Question, Sample, Turn
from mlx_kvret.evaluation.tasks import make_samples

torch = pytest.importorskip("torch")
# not knorm: RoPE keeps norms, so repeated words tie but for rounding, which differs between libraries
METHODS = ["full", "learned", "learned-layer", "learned-head", "recent", "random:policy_seed=2", "keydiff"]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def public(request):
    model, tokenizer = mlx_kvret.load("demo", backend=request.param)
    return PublicEngine(model, tokenizer, chunk=37, buffer=5)


@pytest.mark.parametrize("name", [*METHODS, "learned:min_per_head=2,sinks=1,window=3,lookahead=4"])
def test_public_and_reference_keep_the_same_entries(public, reference, name):
    method = parse_method(name)
    (sample,) = make_samples("facts", 200, 1, seed=1)
    (turn,) = sample.turns
    reading = reference.open([sample], method, 12)
    reading.read([turn])
    cache = public.new_cache(method, 12)
    for start in range(0, 200, 37):
        public.forward(turn.ids[start : start + 37], cache)
    ours = [
        [sorted(p[v].tolist()) for p, v in zip(e.position[0], e.valid[0], strict=True)]
        for e in reading.layers
    ]
    assert ours == [[p.tolist() for p in layer] for layer in cache.kept_positions()]


@pytest.mark.parametrize("name", ["full", "learned", "recent"])
def test_public_and_reference_score_the_same(public, reference, name):
    # two shapes, one of them with several turns
    samples = [*make_samples("facts", 192, 2, seed=2), *make_samples("turns", 192, 1, seed=2)]
    ours, theirs = (engine.run(samples, parse_method(name), 16) for engine in (reference, public))
    assert [o.score for o in ours] == [t.score for t in theirs]
    assert [o.entries for o in ours] == pytest.approx([t.entries for t in theirs])


def generated(references, metric="all", max_tokens=3):
    (sample,) = make_samples("facts", 192, 1, seed=3)
    asked = sample.turns[0].questions[:3]
    questions = tuple(Question(q.ids, (), references, metric, max_tokens) for q in asked)
    return Sample((Turn(sample.turns[0].ids, questions),)), asked


def test_generated_answers_end_and_score_the_same_in_both(public, reference):
    words = public.tokenizer.decode
    _, asked = generated(("x",))
    sample, _ = generated(tuple(words([q.answer[0]]) for q in asked[:2]))
    ours, theirs = (e.run([sample], parse_method("full"), 1)[0].score for e in (reference, public))
    assert ours == theirs
    # each of the first two questions is answered by one of the two words
    assert 1 / 3 <= ours <= 2 / 3


def test_without_eviction_the_reference_is_the_stock_model(reference, stock):
    samples = make_samples("facts", 200, 2, seed=4)
    reading = reference.open(samples, parse_method("full"), 1)
    reading.read([s.turns[0] for s in samples])
    asked = [[s.turns[0].questions[i].ids + (7,) * i for i in range(3)] for s in samples]
    ours = reading.follow(asked)
    for row, sample in enumerate(samples):
        for i, ids in enumerate(asked[row]):
            with torch.no_grad():
                theirs = stock(torch.tensor([sample.turns[0].ids + ids])).logits[0, -len(ids) :]
            assert_near(ours[row, i, : len(ids)], theirs, 128)


@pytest.mark.parametrize("name,seen_by", [("h2o", range(200)), ("snapkv", range(168, 200))])
def test_attention_statistics_are_the_stock_models(reference, stock, name, seen_by):
    (sample,) = make_samples("facts", 200, 1, seed=5)
    reading = reference.open([sample], parse_method(name), 200)
    reading.read([sample.turns[0]])
    with torch.no_grad():
        weights = stock(torch.tensor([sample.turns[0].ids]), output_attentions=True).attentions
    for layer, entries in enumerate(reading.layers):
        # the last chunk has 15 tokens: fewer than the observation window
        held = entries.attention if name == "h2o" else reading.observed(layer)
        paid = weights[layer][0].view(2, 2, 200, 200)[:, :, list(seen_by)].sum((1, 2))
        np.testing.assert_allclose(held[0], paid, atol=1e-3)


def test_likelihoods_are_the_stock_models(public, reference, stock):
    ids = make_samples("facts", 200, 1, seed=6)[0].turns[0].ids
    sample = Sample((Turn(ids, scored=True),))
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0, :-1]
    wanted = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))
    for engine in (public, reference):
        assert engine.run([sample], parse_method("full"), 1)[0].score == pytest.approx(wanted, abs=1e-4)
    # evicted caches predict otherwise, and alike in both engines
    ours, theirs = (e.run([sample], parse_method("recent"), 8)[0].score for e in (reference, public))
    assert ours == pytest.approx(theirs, abs=1e-4) and abs(ours - wanted) > 1e-3


def test_log_likelihoods_by_hand():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    np.testing.assert_allclose(log_likelihoods(None, logits, [0, 2]), np.log([0.25]), rtol=1e-6)
    np.testing.assert_allclose(log_likelihoods(logits[1:], logits, [1, 0]), np.log([0.8, 0.5]), rtol=1e-6)


def test_what_an_engine_cannot_do_is_refused(public, reference):
    assert not public.runs(parse_method("snapkv")) and reference.runs(parse_method("snapkv"))
    with pytest.raises(ConfigError, match="h2o looks at attention"):
        public.new_cache(parse_method("h2o"), 8)
    bare = type(reference).__new__(type(reference))
    bare.gates = None
    with pytest.raises(ConfigError, match="learned needs gates"):
        bare.open([], parse_method("learned"), 8)


def test_the_oracle_keeps_every_useful_position_in_every_head(reference):
    samples = make_samples("facts", 300, 2, seed=7)
    reading = reference.open(samples, parse_method("oracle"), 16)
    reading.read([sample.turns[0] for sample in samples])
    for row, sample in enumerate(samples):
        for entries in reading.layers:
            for position, valid in zip(entries.position[row], entries.valid[row], strict=True):
                assert set(sample.useful) <= set(position[valid].tolist())
