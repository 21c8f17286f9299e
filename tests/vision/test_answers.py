"""What a generated text is taken to answer: letters and numbers."""

import pytest

from mlx_kvret.evaluation.answers import letter, number, same_number
from mlx_kvret.evaluation.samples import Question, text_score


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("**A**", "A"),
        ("The answer is B.", "B"),
        ("Answer: (D) a red car", "D"),
        ("A cat sits there, so the answer is C", "C"),
        ("First I thought the answer is A, but the answer is B", "B"),
        ("It could be (A) or (B); I choose (B)", "B"),
        ("B: the left one", "B"),
        (r"so \boxed{C}", "C"),
        ("A cat sits there", None),
        ("", None),
        ("none of them", None),
    ],
)
def test_letter(text, expected):
    assert letter(text) == expected


def test_an_option_in_words_counts_if_it_is_the_only_one():
    choices = ("red", "blue", "dark blue")
    assert letter("it is red", choices) == "A"
    assert letter("it is coloured", choices) is None
    assert letter("dark blue", choices) is None  # "blue" is an option as well


@pytest.mark.parametrize(
    "text, expected",
    [
        ("7", 7),
        ("The answer is 1,234.5 metres", 1234.5),
        ("3 and 4 make 7", 7),
        (r"\boxed{-2}", -2),
        ("answer: 12 (of 100)", 12),
        ("3/4", 0.75),
        ("1.5e3", 1500),
        ("no idea", None),
        ("", None),
        ("1/0", 1),
    ],
)
def test_number(text, expected):
    assert number(text) == expected


def test_numbers_are_compared_as_far_as_asked():
    assert same_number("1.234", "1.23", 2) and not same_number("1.24", "1.23", 2)
    assert same_number("7.0", "7", 0) and not same_number("8", "7", 0) and not same_number("x", "7", 0)


def test_scores():
    assert text_score(Question((), (), ("B",), "letter"), "The answer is B.") == 1
    assert text_score(Question((), (), ("B",), "letter"), "A") == 0
    assert text_score(Question((), (), ("1.50",), "number", digits=1), "about 1.52") == 1
