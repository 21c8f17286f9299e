"""Tasks in the demo's words against a plain reading of their texts."""

import numpy as np
import pytest

from mlx_kvret.demo.language import BOS, END, RECALL, REMEMBER, RUMOUR
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.demo_tasks import TASKS, make
from mlx_kvret.evaluation.tasks import make_samples

ASKING = [name for name in TASKS if name != "copy"]


def text(sample):
    return [token for turn in sample.turns for token in turn.ids]


def told(ids, mark):
    return [(ids[i + 1], ids[i + 2], i + 2) for i, token in enumerate(ids) if token == mark]


@pytest.mark.parametrize("length", [192, 257, 1024])
@pytest.mark.parametrize("name", ASKING)
def test_every_question_has_the_answer_that_the_text_told_before(name, length):
    sample, read = make(name, length, np.random.default_rng(length)), []
    for turn in sample.turns:
        read += turn.ids
        truth = {key: (value, place) for key, value, place in told(read, REMEMBER)}
        assert {q.ids for q in turn.questions} == {(RECALL, key) for key in truth}
        for question in turn.questions:
            value, place = truth[question.ids[1]]
            assert question.answer == (value, END)
            assert question.useful == (place,)
    assert len(read) == length == sample.tokens
    assert read[0] == BOS and BOS not in read[1:]


@pytest.mark.parametrize("name", ASKING)
def test_no_decoy_tells_the_truth(name):
    ids = text(make(name, 1024, np.random.default_rng(1)))
    truth = {key: value for key, value, _ in told(ids, REMEMBER)}
    assert all(truth.get(key) != value for key, value, _ in told(ids, RUMOUR))


def test_families_differ_as_they_say():
    def at(name):
        ids = text(make(name, 1024, np.random.default_rng(2)))
        return told(ids, REMEMBER), told(ids, RUMOUR)

    assert len(at("bare")[1]) == 0
    # two thirds of the text, rounded to whole sentences of three words
    assert 3 * sum(map(len, at("crowded"))) == pytest.approx(1024 * 2 / 3, abs=9)
    assert len(at("many")[0]) == 48
    facts, decoys = at("hostile")
    assert {name for name, _, _ in decoys} <= {name for name, _, _ in facts} and len(decoys) == 128
    facts, decoys = at("early")
    assert max(place for *_, place in facts) < min(place for *_, place in decoys)


def test_turns_keep_questions_and_answers_in_the_history():
    sample = make("turns", 512, np.random.default_rng(3))
    assert [len(turn.questions) for turn in sample.turns] == [4, 8, 12, 16]
    for before, turn in zip(sample.turns, sample.turns[1:], strict=False):
        right = {(*q.ids, *q.answer) for q in before.questions}
        assert {turn.ids[:4], turn.ids[4:8]} <= right


def test_copy_asks_for_the_next_word_of_the_pattern():
    sample = make("copy", 300, np.random.default_rng(4))
    ids = text(sample)
    for question in sample.turns[0].questions:
        (place,) = question.useful
        assert ids[place - 4 : place + 1] == [*question.ids, *question.answer]


def test_the_nth_sample_depends_on_seed_and_place_only():
    few, many = (make_samples("facts", 256, count, seed=5) for count in (2, 4))
    assert few == many[:2] and many[0] != many[1]
    assert make_samples("facts", 256, 2, seed=6) != few
    assert make_samples("bare", 256, 1, seed=5)[0] != few[0]


def test_too_short_a_text_is_refused():
    with pytest.raises(ConfigError, match="length is 100; the demo tasks need at least 192"):
        make_samples("facts", 100, 1, 0)
