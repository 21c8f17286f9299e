"""``mlx-kvret generate``."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..errors import ConfigError
from . import options as shared
from .session import interruptible, load, prefill_progress, read_text, sampling, stats_line


@click.command("generate")
@shared.model_options
@click.option("--prompt", help="The prompt; after --file: what to ask about the file.")
@click.option("--file", help="Text to read first; '-' is stdin, 'demo' the demo's story of 4,096 tokens.")
@click.option("--system", help="System message, where the model has a chat template.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the model's chat template.")
@shared.eviction_options
@shared.sampling_options
@click.option("--chunk", type=int, default=2048, show_default=True, help="Tokens read at a time.")
@click.option("--stats", is_flag=True, help="Close with a line on speed, kept entries and KV memory.")
@interruptible()
def command(**options: Any) -> None:
    """Generate text from a prompt of any length within a fixed KV budget.

    \b
    Examples:
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64 --stats
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64 --policy recent
      mlx-kvret generate --model mlx-community/Qwen3-4B-4bit --gates ./gates --file book.txt \\
          --prompt "Who is the murderer?" --budget 256MB
      cat notes.txt | mlx-kvret generate --model ./model --gates ./gates --file -
    """
    from ..api import make_cache, stream_generate, wing_of

    text = prompt_text(options.pop("prompt"), options.pop("file"))
    evict, stats, chunk = shared.eviction(options), options.pop("stats"), options.pop("chunk")
    if chunk < 1:
        raise ConfigError(f"--chunk is {chunk}; expected at least 1")
    model, tokenizer = load(options)
    system, raw = options.pop("system"), options.pop("raw")
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer; from Python, give mlx_kvret.generate token ids")
    if system is not None and (raw or tokenizer.chat_template is None):
        raise ConfigError("--system needs a chat template; drop it or --raw")
    prompt: Any = text
    if not raw and tokenizer.chat_template is not None:
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
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
            click.echo(last.text, nl=False)
    click.echo()
    if stats and last is not None:
        click.echo(stats_line(last, wing_of(model).full_nbytes(model, last.seen)), err=True)


def prompt_text(prompt: str | None, file: str | None) -> str:
    """The text to read: a file and then the prompt; without both what is piped in."""
    if prompt is None and file is None:
        if sys.stdin.isatty():
            raise ConfigError("there is nothing to read; give --prompt, --file, or pipe text in")
        file = "-"
    parts = [part for part in (read_text(file) if file else None, prompt) if part is not None]
    text = "\n\n".join(parts)
    if not text.strip():
        raise ConfigError("the prompt is empty; give at least one word")
    return text
