"""``mlx-kvret chat``: one bounded cache for the whole conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError, KVRetError, RankLost
from ..texts import check_stdin
from . import options as shared
from . import ranks
from .company import Company
from .ending import one_line
from .habits import older_names, refusals
from .screen import note
from .session import load, required, sampling, template_of


@click.command("chat")
@shared.model_options
@shared.compile_option
@click.option("--cache", help="Go on with a conversation or a reading that was saved in this file.")
@click.option("--file", multiple=True, help="Text to read first, repeatable; 'demo' is the demo's story.")
@shared.prompt_options
@shared.eviction_options
@shared.sampling_options
@shared.split_option
@refusals
@older_names("--system")
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    """Talk to a model within a fixed KV budget.

    The cache lives across turns, so a turn costs only its new tokens and the conversation has no end. What
    the model said stays as it was said, also where its chat template would shorten it (thoughts, say).

    What is pasted into a terminal is one message; so are lines that end with a backslash, and what stands
    between \"\"\" and \"\"\". Lines such as /help are commands, and text for the model behind a space. Ctrl-C
    stops an answer (twice: leaves at once), ctrl-D leaves.

    \b
    Examples:
      mlx-kvret chat --model demo --budget 64
      mlx-kvret chat --model mlx-community/Qwen3-4B-4bit --gates ./gates --budget 1024
      mlx-kvret chat --model smollm2 --file book.txt
      mlx-kvret chat --model smollm2 --cache notes.kv
    """
    from ..api import backend_of
    from .talk import COMMANDS, Conversation, settings

    saved, files = options.pop("cache"), options.pop("file")
    shared.check_cache_alone(context, saved, options)
    evict = shared.eviction(options)
    if saved is not None:
        # until the file says how it was made; gates may be none
        evict = {"policy": "recent"}
    if ranks.first():
        check_stdin()
    model, tokenizer = load(options)
    company = Company(backend_of(model).ranks_of(model))
    template = template_of(required(tokenizer), options)
    system = options.pop("system_prompt")
    conversation = Conversation(model, tokenizer, system, evict, template, company)
    draw = sampling(model, tokenizer, options)
    draw |= {name: options[name] for name in ("max_tokens", "prefill_step_size")}
    if saved is not None:
        conversation.begin_with(Path(saved).expanduser())
    for file in files:
        if file == "-":
            raise ConfigError("--file is standard input, which what you say comes from; give a file")
        conversation.read(Path(file).expanduser(), options["prefill_step_size"])
    budget = settings(conversation.cache).get("budget")
    kept = "every token" if budget is None else f"up to {budget:,} tokens per head"
    note(f"Commands: {'  '.join(COMMANDS)}. The cache keeps {kept}.", err=True)
    _talk(conversation, company, draw)


def _talk(conversation: Any, company: Company, draw: dict[str, Any]) -> None:
    """To the end of what is said; what cannot be done is said and does not end it."""
    from .typed import messages, next_message

    ask = messages() if company.first else None
    while True:
        try:
            text = company.hear(lambda: None if ask is None else next_message(ask))
            if text is None or not conversation.take(text, draw):
                break
        except RankLost:
            raise
        except KVRetError as error:
            note(f"error: {one_line(error)}", err=True)
