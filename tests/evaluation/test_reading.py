"""Answers generated token by token, against running every continuation again from its start."""

import numpy as np
import pytest

from mlx_kvret.evaluation.engine import end_tokens
from mlx_kvret.evaluation.methods import parse_method
from mlx_kvret.evaluation.samples import Question, Sample, Turn, text_score
from mlx_kvret.evaluation.tasks import make_samples

torch = pytest.importorskip("torch")
from mlx_kvret.evaluation.reading import Continuation  # noqa: E402


def slow_answers(reading, questions):
    """Greedy answers by running whole continuations again for every token."""
    ends, told = end_tokens(reading.engine.tokenizer), []
    for row, asked in enumerate(questions):
        told.append([])
        for q in asked:
            said = []
            while len(said) < q.max_tokens:
                texts = [[] for _ in questions]
                texts[row] = [[*q.ids, *said]]
                logits = reading.follow(texts)[row, 0]
                token = int(logits[len(q.ids) + len(said) - 1].argmax())
                if token in ends:
                    break
                said.append(token)
            told[-1].append(said)
    return told


def generating(task, seed, counts):
    """Samples of a task whose questions ask for some tokens of text, questions of many lengths."""
    samples = make_samples(task, 192, 2, seed=seed)
    made = []
    for sample in samples:
        turns = []
        for turn in sample.turns:
            kept = turn.questions[: len(counts)]
            questions = tuple(
                Question(q.ids + (7,) * i, (), ("x",), "all", count)
                for i, (q, count) in enumerate(zip(kept, counts, strict=False))
            )
            turns.append(Turn(turn.ids, questions))
        made.append(Sample(tuple(turns)))
    return made


@pytest.mark.parametrize("name", ["full", "learned", "recent", "h2o"])
def test_answers_are_those_of_the_slow_way(name, reference, gates):
    reference.use_gates(gates)
    samples = generating("turns", 11, (5, 1, 8))
    samples = [s for s in samples if s.shape == samples[0].shape]
    decode = reference.tokenizer.decode
    reading = reference.open(samples, parse_method(name), 16)
    for index in range(len(samples[0].turns)):
        turns = [sample.turns[index] for sample in samples]
        reading.read(turns)
        questions = [turn.questions for turn in turns]
        slow = slow_answers(reading, questions)
        # what is right is what the slow way says, and something in every answer may be wrong
        truth = [
            [
                Question(q.ids, (), (decode(said), "zzz"), "all", q.max_tokens)
                for q, said in zip(*pair, strict=True)
            ]
            for pair in zip(questions, slow, strict=True)
        ]
        wanted = [
            [text_score(q, decode(said)) for q, said in zip(*pair, strict=True)]
            for pair in zip(truth, slow, strict=True)
        ]
        assert reading.ask(truth) == wanted


@pytest.mark.parametrize("name", ["full", "learned"])
def test_logits_go_on_as_if_run_again(name, reference, gates):
    reference.use_gates(gates)
    samples = make_samples("facts", 200, 2, seed=12)
    reading = reference.open(samples, parse_method(name), 16)
    reading.read([s.turns[0] for s in samples])
    # ragged: other numbers of continuations and of tokens, some that end earlier
    first = [[[3, 4, 5], [6]], [[7, 8]]]
    second = [[[9, 10], []], [[11]]]
    third = [[[12], [13]], [[]]]
    going = Continuation(reading, first)
    found = [going.follow(part) for part in (first, second, third)]
    whole = [
        [a + b + c for a, b, c in zip(*texts, strict=True)]
        for texts in zip(first, second, third, strict=True)
    ]
    slow = reading.follow(whole)
    for row, texts in enumerate(whole):
        for i, ids in enumerate(texts):
            ours = torch.cat(
                [
                    part[row, i, : len(own[row][i])]
                    for part, own in zip(found, (first, second, third), strict=True)
                ]
            )
            np.testing.assert_allclose(ours, slow[row, i, : len(ids)], atol=1e-4)
            alone = [[[]] if r != row else [ids] for r in range(2)]
            np.testing.assert_allclose(ours, reading.follow(alone)[row, 0], atol=1e-4)


def test_a_generated_token_costs_one_token(reference):
    samples = make_samples("facts", 200, 1, seed=13)
    reading = reference.open(samples, parse_method("full"), 1)
    reading.read([s.turns[0] for s in samples])
    widths = []
    handle = reference.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        reading.ask([(Question((3, 4, 5, 6), (), ("x",), "all", 6),)])
    finally:
        handle.remove()
    assert widths[0] == 4 and set(widths[1:]) <= {1} and len(widths) > 1


@pytest.mark.parametrize("chunk", [7, 37, 200])
def test_snapkv_observes_the_last_32_queries_whatever_the_chunk(chunk, reference, stock):
    (sample,) = make_samples("facts", 200, 1, seed=5)
    reading = reference.open([sample], parse_method("snapkv"), 200)
    reading.chunk = chunk
    reading.read([sample.turns[0]])
    with torch.no_grad():
        weights = stock(torch.tensor([sample.turns[0].ids]), output_attentions=True).attentions
    for layer in range(len(reading.layers)):
        paid = weights[layer][0].view(2, 2, 200, 200)[:, :, 168:].sum((1, 2))
        np.testing.assert_allclose(reading.observed(layer)[0], paid, atol=1e-3)
