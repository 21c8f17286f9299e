"""A text that is read before anything is asked about it: the next message joins it, whatever the template."""

import json

import pytest
from transformers import AutoTokenizer

from conversations.templates import CONTROL, FAMILIES, tokenizer_of, write_tokenizer
from mlx_kvret.conversation import BETWEEN, Transcript
from mlx_kvret.errors import CheckpointError

BOOK, MORE = "Anna lives in Rome.\n It rains.", "Ben lives in Oslo"
ASKED = ["Who?", "(a)", " why\n", "7", "é", "Vexalim", "Tombrika Vexalim", "Brimlotu"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        name: tokenizer_of(tmp_path_factory.mktemp(name), family.template, family.stop)
        for name, family in FAMILIES.items()
    }


def read(transcript, text, share=1.0):
    """Read a part of a text; the ids that were read."""
    turn = transcript.plan_text(text)
    ids = turn.new[: int(share * len(turn.new))]
    transcript.account(turn, len(ids), [], "", False)
    return ids


def answer(transcript, text, said=(65, 66)):
    turn = transcript.plan(text)
    transcript.account(turn, len(turn.new) + len(said), list(said), "AB", False)
    return turn.new + list(said)


EACH = pytest.mark.parametrize("name", sorted(FAMILIES))


def same_text(tokenizer, one, two):
    """Whether two readings are the same, apart from what a template says of the time."""
    texts = [tokenizer.decode(ids) for ids in (one, two)]
    return len({text[text.index(BOOK[:4]) :] for text in texts}) == 1


@EACH
@pytest.mark.parametrize("asked", ASKED)
def test_a_reading_and_its_question_are_one_message(tokenizers, name, asked):
    tokenizer = tokenizers[name]
    transcript, joint = Transcript(tokenizer), Transcript(tokenizer)
    ids = read(transcript, BOOK)
    assert len(transcript) == len(ids) and transcript.messages == []
    turn = transcript.plan(asked)
    whole = joint.plan(f"{BOOK}{BETWEEN}{asked.lstrip()}").new
    assert same_text(tokenizer, ids + turn.new, whole) and turn.start == len(ids)
    transcript.account(turn, len(turn.new) + 1, [65], "A", False)
    assert [m["content"] for m in transcript.messages] == [f"{BOOK}{BETWEEN}{asked.lstrip()}", "A"]
    # and on it goes
    joint.account(joint.plan(f"{BOOK}{BETWEEN}{asked.lstrip()}"), len(whole) + 1, [65], "A", False)
    assert transcript.plan("And?").new == joint.plan("And?").new


@EACH
def test_texts_are_read_one_after_another_in_any_turn(tokenizers, name):
    tokenizer = tokenizers[name]
    transcript, joint = Transcript(tokenizer), Transcript(tokenizer)
    ids = read(transcript, BOOK) + read(transcript, MORE) + answer(transcript, "Who?")
    whole = answer(joint, BETWEEN.join([BOOK, MORE, "Who?"]))
    assert same_text(tokenizer, ids, whole)
    ids += read(transcript, MORE) + answer(transcript, "Who again?")
    whole += answer(joint, f"{MORE}{BETWEEN}Who again?")
    assert same_text(tokenizer, ids, whole) and transcript.messages == joint.messages


@EACH
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_reading_that_was_broken_off(tokenizers, name, share):
    tokenizer = tokenizers[name]
    cut = Transcript(tokenizer)
    ids = read(cut, BOOK * 3, share)
    # the same text again goes on where it was left
    again, whole = cut.copy(), Transcript(tokenizer)
    assert same_text(tokenizer, ids + read(again, BOOK * 3), read(whole, BOOK * 3))
    assert len(again) == len(whole)
    # a question is about what was read
    asked = ids + cut.plan("Who?").new
    begun = tokenizer.decode(ids)
    if BOOK[:4] in begun:
        part = begun[begun.index(BOOK[:4]) :]
        joint = Transcript(tokenizer).plan(f"{part}{BETWEEN}Who?").new
        assert same_text(tokenizer, asked, joint)
    assert tokenizer.decode(asked).count("Who?") == 1


@EACH
def test_a_question_that_was_broken_off_is_asked_again_of_the_same_reading(tokenizers, name):
    tokenizer = tokenizers[name]
    transcript = Transcript(tokenizer)
    ids = read(transcript, BOOK)
    turn = transcript.plan("Who is it?")
    transcript.account(turn, 4, [], "", False)
    saved = Transcript.resumed(tokenizer, transcript.notes(), len(transcript))
    for one in (transcript, saved):
        rest = one.plan("Who is it?").new
        joint = Transcript(tokenizer).plan(f"{BOOK}{BETWEEN}Who is it?").new
        assert same_text(tokenizer, ids + turn.new[:4] + rest, joint)


@EACH
def test_control_tokens_in_a_text_are_text(tokenizers, name):
    tokenizer = tokenizers[name]
    transcript = Transcript(tokenizer)
    spelt = f"{BOOK} {''.join(CONTROL)}"
    ids = read(transcript, spelt) + transcript.plan("Who?").new
    special = set(tokenizer.convert_tokens_to_ids(list(CONTROL)))
    plain = Transcript(tokenizer).plan("Who?").new
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert spelt in tokenizer.decode(ids)


@EACH
def test_a_reading_is_saved_and_goes_on(tokenizers, name):
    tokenizer = tokenizers[name]
    transcript = Transcript(tokenizer)
    read(transcript, BOOK)
    notes = transcript.notes()
    resumed = Transcript.resumed(tokenizer, notes, len(transcript))
    assert resumed.plan("Who?") == transcript.plan("Who?")
    state = json.loads(notes["tokens"])
    for wrong in ({"lead": 7}, {"read": len(state["begun"]["ids"])}):
        bad = notes | {"tokens": json.dumps(state | {"begun": state["begun"] | wrong})}
        with pytest.raises(CheckpointError):
            Transcript.resumed(tokenizer, bad, len(transcript))


def merging(folder, *merges):
    """The tokenizer with pairs of tokens that become one, and what they become."""
    write_tokenizer(folder, FAMILIES["plain"].template, "<|im_end|>")
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary) + 100
    data["model"]["merges"] = list(merges)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return AutoTokenizer.from_pretrained(folder), [vocabulary["".join(pair)] for pair in merges]


@pytest.mark.parametrize("asked", ASKED)
def test_tokens_that_reach_over_the_end_of_a_text(tmp_path, asked):
    """Where the blank line melts into one token with what stands before it."""
    tokenizer, merged = merging(tmp_path, ["Ċ", "Ċ"], [".", "ĊĊ"])
    for text in ("Anna.", "Anna"):
        transcript = Transcript(tokenizer)
        ids = read(transcript, text) + transcript.plan(asked).new
        assert ids == Transcript(tokenizer).plan(f"{text}{BETWEEN}{asked.lstrip()}").new
        assert any(token in ids for token in merged)


def test_a_question_that_melts_into_the_text_comes_in_a_turn_of_its_own(tmp_path):
    tokenizer, merged = merging(tmp_path, ["Ċ", "Ċ"], ["ĊĊ", "W"])
    transcript = Transcript(tokenizer)
    ids = read(transcript, BOOK) + transcript.plan("Who?").new
    turns = [{"role": "user", "content": BOOK + BETWEEN}, {"role": "assistant", "content": ""}]
    turns.append({"role": "user", "content": "Who?"})
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == whole
    assert not set(merged) <= set(ids)
