"""Random conversations with random cuts: what a model reads is whole, whatever the template."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.conversation import Transcript

from .templates import CONTROL, FAMILIES, tokenizer_of

PIECES = [
    "hi", " ", "\n", "why", "\t", "é", "🙂", "Quorvexa", "Brimlotu", "Zandofik", "<think>", "</think>",
    "USER:", *CONTROL,
]  # fmt: skip
PLAIN_PIECES = ["hi", " ", "\n", "why", "0", "Quorvexa", "Brimlotu", "<think>", "</think>"]


def texts(pieces):
    return st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join)


def turns(pieces):
    """What is asked, what is answered, whether the answer ends by itself, and where reading breaks off."""
    broken = st.none() | st.floats(0, 1)
    return st.lists(st.tuples(texts(pieces), texts(pieces), st.booleans(), broken), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        name: tokenizer_of(tmp_path_factory.mktemp(name), family.template, family.stop)
        for name, family in FAMILIES.items()
    }


class Reader:
    """A model that reads what it is given and says what it is told to."""

    def __init__(self, family, tokenizer, system=None):
        self.family, self.tokenizer = family, tokenizer
        self.transcript = Transcript(tokenizer, system)
        self.read, self.all, self.closed, self.turns = [], [], True, 0
        self.stop = tokenizer.convert_tokens_to_ids(family.stop)

    def turn(self, asked, answer, ends, broken):
        turn = self.transcript.plan(asked)
        size = len(turn.new) if broken is None else int(broken * len(turn.new))
        self.read += turn.new[:size]
        self.all += turn.new[:size]
        said = []
        if broken is None:
            said = self.plain(answer) + [self.stop] * ends
            self.all += said
        self.transcript.account(turn, size + len(said), said, answer, broken is None and ends)
        return turn

    def plain(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def count(self, ids, text):
        """How often a control token, or a text without one, occurs."""
        token = self.tokenizer.convert_tokens_to_ids(text) if text in CONTROL else None
        return self.tokenizer.decode(ids).count(text) if token is None else ids.count(token)


CHECKED = settings(max_examples=15, deadline=None, derandomize=True)
EACH = pytest.mark.parametrize("name", sorted(FAMILIES))


@EACH
@CHECKED
@given(talk=turns(PIECES), system=st.sampled_from([None, "Zandofik: be brief.", "a\n b"]))
def test_every_turn_is_opened_and_closed_once(tokenizers, name, talk, system):
    found, reader = FAMILIES[name], Reader(FAMILIES[name], tokenizers[name], system)
    for turn in talk:
        reader.turn(*turn)
        # what the cache has read is known token by token
        assert reader.transcript.ids == reader.all and len(reader.transcript) == len(reader.all)
    reader.turn("hi", "yes", True, None)
    own = 0 if system is None else 1
    answered = len(reader.transcript.messages) - own
    roles = [m["role"] for m in reader.transcript.messages[own:]]
    assert roles == ["user", "assistant"] * (answered // 2)
    if found.begin:
        assert reader.count(reader.read, "<s>") == 1 and reader.read[0] == reader.tokenizer.bos_token_id
    if found.once and (system is None or found.always):
        assert reader.count(reader.read, found.once) == 1
    if system is not None:
        assert reader.tokenizer.decode(reader.read).count(system) == 1
    if found.opens in CONTROL:
        opened = reader.count(reader.read, found.opens) - (answered // 2 if found.pairs else answered)
        # a system message takes the place of a default one
        default = bool(found.once) and not found.always
        assert opened == found.preambles + found.system_turn * (own or default)
        # the stop token of an answer closes it, or is followed by what does
        closed = reader.count(reader.all, found.closes) + (found.closes != found.stop)
        assert closed == reader.count(reader.read, found.opens), reader.tokenizer.decode(reader.all)


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.exact))
@CHECKED
@given(talk=turns(PLAIN_PIECES), system=st.sampled_from([None, "Be brief."]))
def test_a_template_that_shows_messages_as_they_are_is_read_as_it_renders(tokenizers, name, talk, system):
    reader = Reader(FAMILIES[name], tokenizers[name], system)
    for turn in talk:
        reader.turn(*turn)
    read = reader.all + reader.transcript.plan("! hi").new
    messages = [*reader.transcript.messages, {"role": "user", "content": "! hi"}]
    whole = reader.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert reader.tokenizer.decode(read) == whole


@EACH
@CHECKED
@given(talk=turns(PIECES))
def test_nothing_that_was_asked_or_said_is_lost(tokenizers, name, talk):
    reader = Reader(FAMILIES[name], tokenizers[name])
    for asked, answer, ends, _ in talk:
        before = len(reader.all)
        turn = reader.turn(asked, answer, ends, None)
        assert asked.strip() in reader.tokenizer.decode(turn.new)
        assert reader.tokenizer.decode(reader.all[before + len(turn.new) :]).startswith(answer)


@EACH
@CHECKED
@given(talk=turns(PIECES), system=st.sampled_from([None, "Be brief."]))
def test_a_saved_conversation_goes_on_as_it_would_have(tokenizers, name, talk, system):
    reader = Reader(FAMILIES[name], tokenizers[name], system)
    for turn in talk:
        reader.turn(*turn)
    again = Transcript.resumed(reader.tokenizer, reader.transcript.notes(), len(reader.all))
    assert again.ids == reader.all
    found, wanted = (t.plan("why").new for t in (again, reader.transcript))
    # some templates tell the time
    assert re.sub(r"\d", "", reader.tokenizer.decode(found)) == re.sub(
        r"\d", "", reader.tokenizer.decode(wanted)
    )
