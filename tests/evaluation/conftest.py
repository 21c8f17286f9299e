"""The shipped demo in both engines, and a tokenizer of characters made on the spot."""

import pytest

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import load_gates


@pytest.fixture(scope="session")
def stock():
    """The demo model as transformers loads it, with its own attention."""
    transformers = pytest.importorskip("transformers", reason="an extra; CI installs it")
    return transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def gates():
    return load_gates(demo.GATES)


@pytest.fixture(scope="session")
def reference(gates):
    """A reference engine with an odd chunk and buffer, three texts at a time."""
    transformers = pytest.importorskip("transformers", reason="an extra; CI installs it")
    from mlx_kvret.evaluation.reference import ReferenceEngine

    model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    engine = ReferenceEngine(model, tokenizer, chunk=37, buffer=5, batch=3)
    engine.use_gates(gates)
    return engine


@pytest.fixture(scope="session")
def characters():
    """A tokenizer with one token per character and a begin token."""
    transformers = pytest.importorskip("transformers", reason="an extra; CI installs it")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<s>": 0, "<unk>": 1} | {chr(i): i for i in range(32, 127)} | {"\n": 10}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
