"""A prompt in every form people have it in, and everything else refused."""

from array import array
from collections import UserDict, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_kvret.core.prompts import check_ids, prompt_ids
from mlx_kvret.errors import ConfigError

IDS = [5, 0, 9]


class Letters:
    """A tokenizer of one token a letter; 0 begins a text."""

    bos_token = "^"
    chat_template = "yes"

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(letter) - 96 for letter in text.replace("^", "`")]

    def apply_chat_template(self, messages, add_generation_prompt=False, return_dict=True):
        assert add_generation_prompt and not return_dict
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported\nat line 3")
        return [*self.encode("".join(m["content"] for m in messages), False), 26]


class Bare(Letters):
    chat_template = None


FORMS = {
    "list": IDS,
    "tuple": tuple(IDS),
    "row": [IDS],
    "row of a tuple": (tuple(IDS),),
    "numpy": np.array(IDS),
    "numpy row": np.array([IDS], np.uint16),
    "numpy numbers": [np.int64(i) for i in IDS],
    "arrays without dimensions": [np.array(i) for i in IDS],
    "row of an array": [np.array(IDS)],
    "array": array("i", IDS),
    "deque": deque(IDS),
    "input_ids": {"input_ids": IDS, "attention_mask": [1, 1, 1]},
    "BatchEncoding": UserDict(input_ids=np.array([IDS]), attention_mask=np.ones((1, 3), bool)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_ids(form):
    found = prompt_ids(None, form, True, 10)
    assert found == IDS and {type(i) for i in found} == {int}


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9))
def test_any_ids_in_any_form(ids):
    for form in (ids, np.array(ids), np.array([ids]), [ids], {"input_ids": [ids]}, tuple(ids)):
        assert prompt_ids(None, form, True, 100) == ids


def test_text_begins_once():
    assert prompt_ids(Letters(), "ab", True) == [0, 1, 2]
    assert prompt_ids(Letters(), "^ab", True) == prompt_ids(Letters(), "ab", True)
    assert prompt_ids(Letters(), "ab", False) == [1, 2]


def test_messages_go_through_the_template():
    messages = [{"role": "user", "content": "ab"}]
    for form in (messages, tuple(messages), [UserDict(messages[0])]):
        assert prompt_ids(Letters(), form, True) == [1, 2, 26]


WRONG = {
    "None": (None, "the prompt is None"),
    "number": (7, "the prompt is an int"),
    "float": (7.5, "the prompt is a float"),
    "bytes": (b"ab", "the prompt is a bytes"),
    "set": ({5, 9}, "the prompt is a set"),
    "generator": ((i for i in IDS), "the prompt is a generator"),
    "array without dimensions": (np.array(5), "the prompt is a ndarray"),
    "empty list": ([], "empty"),
    "empty row": ([[]], "empty"),
    "empty array": (np.zeros((1, 0)), "empty"),
    "empty text": ("", "empty"),
    "ragged": ([5, [9]], r"holds \[9\] where a token id should be"),
    "two rows": ([[5], [9]], "2 rows"),
    "two rows of an array": (np.ones((2, 3), int), "2 rows"),
    "no rows": (np.ones((0, 3), int), "empty"),
    "three dimensions": (np.ones((1, 1, 3), int), "where a token id should be"),
    "floats": ([5.0, 9.0], r"holds 5\.0 where"),
    "array of floats": (np.array(IDS, np.float32), r"holds 5\.0 where"),
    "truths": ([True, False], "holds True where"),
    "array of truths": (np.array([True]), "holds True where"),
    "texts": (["ab", "cd"], "holds 'ab' where"),
    "one text in a list": (["ab"], "holds 'ab' where"),
    "None among ids": ([5, None], "holds None where"),
    "complex": ([1j], "where a token id should be"),
    "object array": (np.array([5, "a"], object), "holds 'a' where"),
    "dict": ({"ids": IDS}, "a mapping without input_ids"),
    "one message": ({"role": "user", "content": "ab"}, "put it in brackets"),
    "pixels": ({"input_ids": IDS, "pixel_values": [0.5]}, "holds pixel_values"),
    "padded": ({"input_ids": [IDS], "attention_mask": [[0, 1, 1]]}, "attention_mask hides"),
    "message without a role": ([{"content": "ab"}], "expected mappings with role and content"),
    "message among ids": ([5, {"role": "user", "content": "ab"}], "holds 5 among messages"),
    "template refuses": ([{"role": "system", "content": "ab"}], "refuses these messages: System role not s"),
    "half a surrogate": ("a\ud800", "no valid text: character 1"),
    "negative": ([5, -5], "token id -5"),
    "outside": ([5, 10**6], "token id 1000000, the model's are 0 to 99"),
    "just outside": ([100], "token id 100"),
    "far outside": ([10**5000], "token id a whole number of about"),
}


@pytest.mark.parametrize(("prompt", "says"), WRONG.values(), ids=WRONG)
def test_everything_else_is_one_clear_error(prompt, says):
    with pytest.raises(ConfigError, match=says) as caught:
        prompt_ids(Letters(), prompt, True, 100)
    assert len(str(caught.value)) < 400


def test_text_and_messages_need_what_reads_them():
    messages = [{"role": "user", "content": "ab"}]
    with pytest.raises(ConfigError, match="no tokenizer, so the prompt must be a list of token ids"):
        prompt_ids(None, "ab", True)
    for tokenizer in (None, Bare()):
        with pytest.raises(ConfigError, match="no chat template; give text or token ids"):
            prompt_ids(tokenizer, messages, True)
    with pytest.raises(ConfigError, match="begin a conversation, and the cache has read one already"):
        prompt_ids(Letters(), messages, False)


def test_a_tokenizer_of_another_model():
    with pytest.raises(ConfigError, match="token id 26"):
        prompt_ids(Letters(), "az", True, 20)


def test_a_vocabulary_that_is_not_known():
    assert prompt_ids(None, [10**6], True) == [10**6]
    with pytest.raises(ConfigError, match="token id -1, the model's are numbers from 0 up"):
        prompt_ids(None, [-1], True)
    with pytest.raises(ConfigError, match="token id 5, the draft model's are 0 to 3"):
        check_ids([5], 4, "the draft model")
