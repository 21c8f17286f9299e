"""Generated text tasks, with one token per character so that positions can be read off."""

import re
from itertools import pairwise

import pytest

from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.samples import Question, text_score, word_f1
from mlx_kvret.evaluation.tasks import make_samples
from mlx_kvret.evaluation.text_tasks import TASKS
from mlx_kvret.evaluation.writer import Writer


def read(sample, places=None):
    ids = [token for turn in sample.turns for token in turn.ids]
    return "".join(chr(ids[p]) for p in (range(1, len(ids)) if places is None else places))


@pytest.mark.parametrize("length", [1500, 4001])
@pytest.mark.parametrize("name", TASKS)
def test_the_answer_stands_at_the_useful_positions(name, length, characters):
    for sample in make_samples(name, length, 3, 1, characters):
        assert sample.turns[0].ids[0] == characters.bos_token_id
        assert length - 100 * len(sample.turns) <= sample.tokens <= length
        for question in [question for turn in sample.turns for question in turn.questions]:
            assert all(reference in read(sample, question.useful) for reference in question.references)
            assert text_score(question, " and ".join(question.references)) == 1.0


@pytest.mark.parametrize(
    "name,references,told",
    [
        ("needle-single", 1, 1),
        ("needle-multikey", 1, 8),
        ("needle-multivalue", 4, 4),
        ("needle-multiquery", 4, 8),
    ],
)
def test_needles_are_as_many_as_the_task_says(name, references, told, characters):
    (sample,) = make_samples(name, 2000, 1, 2, characters)
    assert len(set(sample.turns[0].questions[0].references)) == references
    assert read(sample).count("secret numbers") == told


def test_turns_ask_for_all_numbers_so_far_and_keep_one_answer(characters):
    (sample,) = make_samples("multi-turn", 3000, 1, 3, characters)
    assert [len(turn.questions) for turn in sample.turns] == [2, 4, 6, 8]
    for before, turn in pairwise(sample.turns):
        said = "".join(map(chr, turn.ids))
        kept = ["".join(map(chr, q.ids)) + f" {q.references[0]}.\n" for q in before.questions]
        assert sum(said.startswith(answered) for answered in kept) == 1
    assert all(
        max(q.useful) < sum(len(t.ids) for t in sample.turns[: i + 1])
        for i, turn in enumerate(sample.turns)
        for q in turn.questions
    )


def test_variables_are_handed_on_in_order(characters):
    (sample,) = make_samples("variable-tracking", 2000, 1, 3, characters)
    (question,) = sample.turns[0].questions
    text, names = read(sample), question.references
    (value,) = re.findall(rf"VAR {names[0]} = (\d+)\.", text)
    assert value in "".join(map(chr, question.ids)) and len(names) == 5
    places = [text.index(f"VAR {b} = VAR {a}.") for a, b in pairwise(names)]
    assert places == sorted(places)
    # the other chain has another value
    assert len(set(re.findall(r"VAR \w+ = (\d+)\.", text))) == 2


def test_common_words_are_the_most_common(characters):
    (sample,) = make_samples("common-words", 8000, 1, 4, characters)
    words = read(sample).split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert set(ranked[:10]) == set(sample.turns[0].questions[0].references)


def test_same_seed_same_text(characters):
    assert make_samples("key-value", 500, 2, 1, characters) == make_samples(
        "key-value", 500, 2, 1, characters
    )
    assert make_samples("key-value", 500, 1, 1, characters) != make_samples(
        "key-value", 500, 1, 2, characters
    )


def test_chat_template_goes_around_text_and_question(characters):
    characters.chat_template = "<{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    try:
        (sample,) = make_samples("needle-single", 500, 1, 1, characters, chat=True)
    finally:
        characters.chat_template = None
    assert "".join(map(chr, sample.turns[0].ids)).startswith("<[")
    assert "".join(map(chr, sample.turns[0].questions[0].ids)).endswith("are]>")


def test_what_cannot_be_written_is_refused(characters):
    with pytest.raises(ConfigError, match="length is 50; this task needs"):
        make_samples("needle-multikey", 50, 1, 1, characters)
    with pytest.raises(ConfigError, match="no chat template"):
        Writer(characters, chat=True)
    with pytest.raises(ConfigError, match="no tokenizer"):
        make_samples("needle-single", 500, 1, 1, None)
    with pytest.raises(ConfigError, match="task 'needle' is not known"):
        make_samples("needle", 500, 1, 1, characters)


@pytest.mark.parametrize(
    "metric,text,score",
    [
        ("all", "it is Red", 0.5),
        ("any", "it is Red", 1.0),
        ("all", "nothing", 0.0),
        ("any", "nothing", 0.0),
        ("f1", "The red!", 1.0),
        ("f1", "red car", 2 / 3),
    ],
)
def test_scores(metric, text, score):
    assert text_score(Question((), (), ("red", "blue"), metric), text) == pytest.approx(score)


def test_word_overlap_counts_repetitions():
    assert word_f1("a b b", "b b c") == pytest.approx(2 * 2 / (2 + 3))
    assert word_f1("", "b") == 0.0
