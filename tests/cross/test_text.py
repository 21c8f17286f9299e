"""Both backends say the same text for the same tokens: what the tokenizer makes of all of them."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvret

torch = pytest.importorskip("torch", reason="an extra; CI installs it")

TEXT = [" amber", " naïve 日本🙂", "the cat\n sat\n\n  down", "\n a", " ", "x  y"]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer with no more tokens than the demo model has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    used = {c for text in TEXT for word, _ in level.pre_tokenize_str(text) for c in word}
    # the first ones end a text of the demo
    vocabulary = {token: i for i, token in enumerate(["<a>", "<b>", "<c>", *sorted(used)])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def said(model, tokenizer, ids, array):
    """The text of an answer that is bound to be ``ids``."""
    rest = iter([*ids, 3])  # the loop runs ahead
    options = {"budget": 16, "max_tokens": len(ids), "sampler": lambda _: array([next(rest)])}
    parts = [r.text for r in mlx_kvret.stream_generate(model, tokenizer, [3, 4], **options)]
    return "".join(parts)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_text_is_that_of_all_tokens(tokenizer, backend):
    array = mx.array if backend == "mlx" else torch.tensor
    model, own = mlx_kvret.load("demo", backend=backend)
    for text in TEXT:
        assert said(model, tokenizer, tokenizer.encode(text), array) == text
    for ids in np.random.default_rng(0).integers(3, 198, (3, 8)).tolist():
        assert said(model, own, ids, array) == own.decode(ids)
