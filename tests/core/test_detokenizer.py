"""Text as it comes is that of all tokens together, for every kind of tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.detokenizer import Detokenizer

TEXT = [
    "the cat's hat, he said",
    "\n\nnaïve façade — größe",
    "日本語 テキスト 🙂👍🏽",
    "a  b   c\n d\te",
    "x = [1, 2];\n",
]


def byte_level(tokenizers):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXT * 5, trainer)
    return made


def sentencepiece(tokenizers, prepend="always"):
    """As of SentencePiece: a mark for a space, bytes for what is unknown."""
    marks = ["\u2581", *"abcdehtsx.,\n", "\u2581a", "\u2581the", "\u2581cat", "at", "日"]
    vocabulary = {
        token: i for i, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *marks])
    }
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    decoders = tokenizers.decoders
    if prepend == "llama":
        made.decoder = decoders.Sequence([
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
    else:
        space = decoders.Metaspace(prepend_scheme=prepend)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), space])
    return made


def wordpiece(tokenizers):
    words = ["[UNK]", "the", "cat", "##s", "##ing", "play", "'", ".", ",", "!", "n't", "do", "日"]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}))
    made.decoder = tokenizers.decoders.WordPiece()
    return made


KINDS = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece, nothing prepended": lambda tokenizers: sentencepiece(tokenizers, "never"),
    "llama": lambda tokenizers: sentencepiece(tokenizers, "llama"),
    "wordpiece": wordpiece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    tokenizers = pytest.importorskip("tokenizers", reason="a requirement of either backend")
    return KINDS[request.param](tokenizers)


def parts_of(tokenizer):
    """Tokens, and the bytes of characters: one that is wrong changes what those before it are decoded to."""
    vocabulary = tokenizer.get_vocab()
    plain = [[i] for token, i in vocabulary.items() if not token.startswith("<0x")]
    if len(plain) == len(vocabulary):
        return st.sampled_from(plain)
    # no encoder spells the mark for a space in bytes, and what those mean hangs on all that stand before
    any_other = st.characters(codec="utf-8", exclude_characters="\u2581")
    spelt = any_other.map(lambda c: [vocabulary[f"<0x{b:02X}>"] for b in c.encode()])
    return st.sampled_from(plain) | spelt


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_parts_are_the_whole(tokenizer, data):
    ids = [i for part in data.draw(st.lists(parts_of(tokenizer), max_size=20)) for i in part]

    def decode(part):
        return tokenizer.decode(part, skip_special_tokens=False)

    text = Detokenizer(decode)
    parts = [text.add(token) for token in ids]
    assert "".join([*parts, text.end()]) == decode(ids)
    assert text.end() == ""


def test_whole_characters_only(tokenizer):
    def decode(part):
        return tokenizer.decode(part, skip_special_tokens=False)

    ids = [i for word in TEXT for i in tokenizer.encode(word).ids]
    text = Detokenizer(decode)
    assert not any("\ufffd" in text.add(token) for token in ids) or "\ufffd" in decode(ids)
