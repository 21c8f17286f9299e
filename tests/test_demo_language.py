"""The demo language: words, stories and what is refused."""

import json
import subprocess
import sys

import pytest

from mlx_kvret import demo
from mlx_kvret.demo import language
from mlx_kvret.demo.language import (
    BOS,
    END,
    FILLER,
    ID,
    NAMES,
    RECALL,
    REMEMBER,
    RUMOUR,
    SUCCESSORS,
    VALUES,
    WORDS,
    decode,
    encode,
    question,
    story,
)


def told(ids, mark):
    """(name, value) of every element with this mark."""
    words = [WORDS[i] for i in ids]
    return [(words[i + 1], words[i + 2]) for i, token in enumerate(ids) if token == mark]


def test_words_are_distinct_and_of_equal_parts():
    assert len(WORDS) == len(set(WORDS)) == 198
    assert len(NAMES) == len(VALUES) == len(FILLER) == 64
    assert all(word == word.strip() and " " not in word for word in WORDS)


def test_filler_has_four_different_successors_and_no_dead_end():
    assert SUCCESSORS.shape == (64, 4)
    assert all(len(set(row)) == 4 for row in SUCCESSORS.tolist())
    assert {WORDS[i] for i in SUCCESSORS.ravel()} == set(FILLER)


def test_text_and_ids_are_each_others_inverse():
    ids = story(200, facts=3).ids[1:]
    assert encode(decode(ids)) == list(ids)


@pytest.mark.parametrize("tokens,facts,decoys", [(4, 1, 0), (256, 16, None), (300, 64, 35), (1024, 16, 128)])
def test_story_has_what_was_asked_for(tokens, facts, decoys):
    made = story(tokens, facts, decoys, seed=3)
    assert len(made.ids) == tokens
    assert made.ids[0] == BOS and BOS not in made.ids[1:] and END not in made.ids
    assert sorted(told(made.ids, REMEMBER)) == sorted(made.facts.items())
    assert len(made.facts) == facts
    assert len(told(made.ids, RUMOUR)) == (tokens // 8 if decoys is None else decoys)
    assert [WORDS[made.ids[i]] for i in made.useful] == list(made.facts.values())
    assert made.text == decode(made.ids[1:])


def test_decoys_never_tell_the_truth_and_half_are_about_facts():
    made = story(4096, seed=5)
    decoys = told(made.ids, RUMOUR)
    assert all(made.facts.get(name) != value for name, value in decoys)
    # one half on purpose, a quarter of the other by chance
    assert 0.5 < sum(name in made.facts for name, _ in decoys) / len(decoys) < 0.75


def test_same_seed_same_story():
    assert story(500, seed=1) == story(500, seed=1)
    assert story(500, seed=1) != story(500, seed=2)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"tokens": 100, "facts": 0}, "facts is 0; expected 1 to 64"),
        ({"tokens": 1000, "facts": 65}, "facts is 65; expected 1 to 64"),
        ({"tokens": 100, "decoys": -1}, "decoys is -1"),
        ({"tokens": 60}, "tokens is 60; 16 facts and 7 decoys of 3 tokens need 70 or more"),
    ],
)
def test_impossible_stories_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        story(**arguments)


def test_unknown_words_and_names_are_refused():
    with pytest.raises(ValueError, match="no word 'elephant'"):
        encode("the elephant walks")
    with pytest.raises(ValueError, match="'miller' is not a name"):
        question("miller")
    assert question("Anna") == (RECALL, ID["Anna"])


def test_import_needs_no_tensor_library():
    code = "import sys, mlx_kvret.demo.language; sys.exit(bool({'torch', 'mlx'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shipped_vocabulary_is_the_language():
    stored = json.loads((demo.MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["model"]["vocab"] == language.ID


def test_shipped_story_is_4096_tokens_of_the_language():
    ids = [BOS, *encode(demo.STORY.read_text(encoding="utf-8"))]
    assert len(ids) == 4096
    assert len(told(ids, REMEMBER)) == 16 and len(told(ids, RUMOUR)) == 512
    assert RECALL not in ids


def test_shipped_tokenizer_puts_the_start_token_first():
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(demo.MODEL)
    assert tokenizer("recall Anna")["input_ids"] == [BOS, *question("Anna")]
    assert tokenizer.decode(encode("recall Anna amber")) == "recall Anna amber"
    turns = [
        {"role": "user", "content": "recall Anna"},
        {"role": "assistant", "content": "amber"},
        {"role": "user", "content": "recall Max"},
    ]
    assert tokenizer.apply_chat_template(turns, return_dict=False) == [
        BOS,
        *encode("recall Anna amber . recall Max"),
    ]
