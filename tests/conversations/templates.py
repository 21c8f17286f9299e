"""Chat templates with the habits of well-known families, in our own words, and a tokenizer to render them.

What each does to a conversation is said beside it; none is a copy.
"""

import json
from dataclasses import dataclass
from pathlib import Path

_TURN = "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ %s ~ '<|im_end|>\\n' }}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

# a default system message when there is none
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a small helper.<|im_end|>\\n' }}{% endif %}"
    + _TURN % "m.content" + "{% endfor %}" + _OPEN
)  # fmt: skip

# thoughts stay in answers after the last question and are dropped from earlier ones
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role != 'assistant' %}" + _TURN % "m.content" + "{% else %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n')"
    " if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    + _TURN % "'<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ said" + "{% else %}" + _TURN % "said"
    + "{% endif %}{% endif %}{% endfor %}" + _OPEN +
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)  # fmt: skip

# the day stands in a system turn of its own making; contents are trimmed; the begin token is in the template
LLAMA3 = (
    "{{ bos_token }}{% set own = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' ~ strftime_now('%d %b %Y %H:%M:%S.%f')"
    " ~ '\\n\\n' ~ own ~ '<|eot_id|>' }}"
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ (m.content | trim) ~ '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# no system turn: its text opens the first question; roles alternate; contents are trimmed
GEMMA3 = (
    "{{ bos_token }}{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% set before = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{% for m in talk %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must take turns: user, assistant, user, ...') }}{% endif %}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n'"
    " ~ (before if loop.first else '') ~ (m.content | trim) ~ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

# channels: only final answers are shown again, a channel in a content is refused; the newest answer that is
# rendered ends differently from earlier ones
GPT_OSS = (
    "{{ '<|start|>system<|message|>Today: ' ~ strftime_now('%Y-%m-%d %f') ~ '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' ~ m.content ~ '<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' ~ m.content ~ '<|end|>' }}{% else %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('a channel in a content') }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}"
    "{% if loop.last and not add_generation_prompt %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

# the system text stands in front of the newest question; roles alternate; no line breaks anywhere
MISTRAL = (
    "{{ bos_token }}{% set own = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set talk = messages[1:] if own is not none else messages %}"
    "{% for m in talk %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('after the optional system message, roles must take turns') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' ~ (own ~ '\\n\\n' if own is not none and loop.last else '')"
    " ~ m.content ~ '[/INST]' }}{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
)

# no system role at all
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + _TURN % "m.content" + "{% endfor %}" + _OPEN
)  # fmt: skip

# the system message is dropped without a word
DEAF = (
    "{% for m in messages %}{% if m.role != 'system' %}" + _TURN % "m.content" + "{% endif %}{% endfor %}"
    + _OPEN
)  # fmt: skip

# no control tokens: words and line breaks
WORDS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content ~ '\\n\\n' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' ~ m.content ~ '\\n' }}"
    "{% else %}{{ 'ASSISTANT:' ~ m.content ~ '</s>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

PLAIN = "{% for m in messages %}" + _TURN % "m.content" + "{% endfor %}" + _OPEN


@dataclass(frozen=True)
class Family:
    """A template, the token that ends an answer, and how a conversation looks."""

    template: str
    stop: str
    opens: str
    closes: str
    # what stands once, in the opening: unless there is a system message, or always
    once: str = ""
    always: bool = False
    begin: bool = False
    # a question and its answer share one opening and one closing
    pairs: bool = False
    # turns in front of the first message, and whether a system message is one
    preambles: int = 0
    system_turn: bool = True
    # messages are shown as they are
    exact: bool = False


FAMILIES = {
    "plain": Family(PLAIN, "<|im_end|>", "<|im_start|>", "<|im_end|>", exact=True),
    "smollm2": Family(
        SMOLLM2, "<|im_end|>", "<|im_start|>", "<|im_end|>", "You are a small helper.", exact=True
    ),
    "qwen3": Family(QWEN3, "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    "llama3": Family(
        LLAMA3, "<|eot_id|>", "<|start_header_id|>", "<|eot_id|>", "Today: ", always=True, begin=True,
        preambles=1, system_turn=False,
    ),
    "gemma3": Family(
        GEMMA3, "<end_of_turn>", "<start_of_turn>", "<end_of_turn>", begin=True, system_turn=False
    ),
    "gpt-oss": Family(
        GPT_OSS, "<|return|>", "<|start|>", "<|end|>", "Today: ", always=True, preambles=1
    ),
    "mistral": Family(MISTRAL, "</s>", "[INST]", "</s>", begin=True, pairs=True, system_turn=False),
    "words": Family(WORDS, "</s>", "USER:", "</s>", pairs=True, exact=True),
}  # fmt: skip
CONTROL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>",
    "[INST]", "[/INST]",
)  # fmt: skip
VOCABULARY = 256 + len(CONTROL)


def write_tokenizer(folder, template=None, stop="<|im_end|>"):
    """A tokenizer with one token for each byte, and control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": stop,
        "clean_up_tokenization_spaces": False, "model_max_length": 100_000,
    }  # fmt: skip
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tokenizer_of(folder, template=None, stop="<|im_end|>"):
    """The same, opened by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tokenizer(folder, template, stop))
