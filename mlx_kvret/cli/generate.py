"""``mlx-kvret generate``."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..errors import ConfigError
from ..texts import read_text
from . import options as shared
from .session import cut_note, load, note, prefill_progress, sampling, say, stats_line


@click.command("generate")
@shared.model_options
@click.option("--prompt", help="The prompt; after --file: what to ask about the file.")
@click.option("--file", help="Text to read first; '-' is stdin, 'demo' the demo's story of 4,096 tokens.")
@click.option("--system", help="System message, where the model's chat template takes one.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the model's chat template.")
@shared.eviction_options
@shared.sampling_options
@click.option("--chunk", type=int, default=2048, show_default=True, help="Tokens read at a time.")
@click.option("--stats", is_flag=True, help="Close with a line on speed, kept tokens and KV memory.")
def command(**options: Any) -> None:
    """Generate text from a prompt of any length within a fixed KV budget.

    On every backend the prompt is one message in the model's chat template, if it has one, and names of
    control tokens in it are text. With --raw, and for models without a template, the text is read as it is
    and control tokens in it count. (The functions mlx_kvret.generate and stream_generate take text as --raw
    does.)

    \b
    Examples:
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64 --stats
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64 --policy recent
      mlx-kvret generate --model mlx-community/Qwen3-4B-4bit --gates ./gates --file book.txt \\
          --prompt "Who is the murderer?" --budget 256MB
      cat notes.txt | mlx-kvret generate --model ./model --gates ./gates --file -
    """
    from ..api import make_cache, stream_generate
    from ..core.prompts import has_chat_template

    text = prompt_text(options.pop("prompt"), options.pop("file"))
    evict, stats, chunk = shared.eviction(options), options.pop("stats"), options.pop("chunk")
    if chunk < 1:
        raise ConfigError(f"--chunk is {chunk}; expected at least 1")
    model, tokenizer = load(options)
    system, raw = options.pop("system"), options.pop("raw")
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer; from Python, give mlx_kvret.generate token ids")
    plain = raw or not has_chat_template(tokenizer)
    if system is not None and plain:
        raise ConfigError("--system needs a chat template; drop it or --raw")
    prompt = text if plain else message_ids(tokenizer, system, text)
    cache, last = make_cache(model, **evict), None
    with prefill_progress() as progress:
        for last in stream_generate(
            model,
            tokenizer,
            prompt,
            cache=cache,
            max_tokens=options["max_tokens"],
            prefill_step_size=chunk,
            prompt_progress_callback=progress,
            **sampling(model, options),
        ):
            say(last.text)
    click.echo()
    cut_note(last, options["max_tokens"])
    if stats and last is not None:
        note(stats_line(model, cache, last), err=True)


def message_ids(tokenizer: Any, system: str | None, text: str) -> list[int]:
    """Token ids of one message in the model's chat template."""
    from ..conversation import Transcript

    return Transcript(tokenizer, system).plan(text).new


def prompt_text(prompt: str | None, file: str | None) -> str:
    """The text to read: a file and then the prompt; without both what is piped in."""
    if prompt is None and file is None:
        if sys.stdin is not None and sys.stdin.isatty():
            raise ConfigError("there is nothing to read; give --prompt, --file, or pipe text in")
        file = "-"
    parts = [part for part in (read_text(file) if file else None, prompt) if part is not None]
    text = "\n\n".join(parts)
    if not text.strip():
        raise ConfigError("the prompt is empty; give at least one word")
    return text
