"""Write the package data of mlx_kvret.demo: a Hugging Face folder, a gate checkpoint and a story."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model import CONFIG
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from mlx_kvret.core.checkpoint import load_gates, save_gates
from mlx_kvret.core.files import whole_file, whole_folder
from mlx_kvret.demo.language import BOS, END, ID, MARKS, Story

# no word tells who speaks, since the model knows none; an answer ends with the end token, as in training
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; ``<s>`` goes first unless special tokens are declined."""
    words = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=MARKS[BOS],
        eos_token=MARKS[END],
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONFIG.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    )


def write_model(folder: Path, model: Qwen3ForCausalLM) -> None:
    """The folder that ``mlx_lm.load`` and ``AutoModelForCausalLM.from_pretrained`` open."""
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, do_sample=False)
    with _replaced(folder) as fresh, whole_folder(fresh) as scratch:
        model.save_pretrained(scratch)
        tokenizer().save_pretrained(scratch)
        # names that releases before transformers 5 look for; the new ones are there as well or implied
        _add(scratch / "config.json", rope_theta=CONFIG.rope_parameters["rope_theta"])
        _add(scratch / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        for file in scratch.iterdir():
            file.chmod(0o644)


def write_gates(folder: Path, chosen: Path, told: dict[str, Any]) -> None:
    """A copy of the chosen checkpoint, with more about where it comes from."""
    gates = load_gates(chosen)
    with _replaced(folder) as fresh:
        save_gates(fresh, gates.config, gates.tensors, gates.provenance | told)


def write_story(path: Path, story: Story) -> None:
    """The story's words, 16 to a line."""
    words = story.text.split()
    lines = [" ".join(words[i : i + 16]) for i in range(0, len(words), 16)]
    with whole_file(path) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
        scratch.chmod(0o644)


def _add(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A path beside ``folder`` to write to; what is there afterwards replaces ``folder``."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    yield fresh
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
