"""``mlx-kvret generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..core.options import whole
from ..errors import ConfigError
from ..texts import read_picture, read_text
from . import options as shared
from .habits import older_names, refusals
from .many import answer_many
from .pictures import Pictures
from .ranks import check_stdin
from .screen import note, progress
from .session import (
    chosen_template,
    cut_note,
    draft_of,
    load,
    required,
    sampling,
    say,
    stats_line,
)

# what goes with one prompt alone
MANY_WITHOUT = (
    "prompt",
    "file",
    "image",
    "cache",
    "prefill_response",
    "draft_model",
    "num_draft_tokens",
    "verbose",
)


@click.command("generate")
@shared.model_options
@shared.compile_option
@click.option("--prompt", "-p", help="The prompt, '-' for stdin; after --file: what to ask about the file.")
@click.option("--file", help="Text to read first; '-' is stdin, 'demo' the demo's story of 4,096 tokens.")
@shared.image_option
@click.option("--prompts", help="Answer many prompts side by side: a file of JSON lines, see below.")
@click.option("--rows", type=int, help="How many of them at a time.  [default: 8]")
@click.option("--cache", help="Go on with a reading or a chat that was saved in this file.")
@shared.prompt_options
@click.option("--prefill-response", help="What the answer begins with; control tokens in it count.")
@shared.ignore_template_option
@shared.eviction_options
@shared.sampling_options
@shared.split_option
@click.option("--draft-model", help="Smaller model that proposes tokens (speculative decoding), on MLX.")
@click.option("--num-draft-tokens", type=int, help="Tokens it proposes at a time.  [default: 3]")
@click.option(
    "--verbose",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    metavar="[true|false]",
    help="Close with a line on speed, kept tokens and KV memory.",
)
@refusals
@older_names("--system", "--raw", "--chunk", "--stats")
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    """Generate text from a prompt of any length within a fixed KV budget.

    On every backend the prompt is one message in the model's chat template, if it has one, and names of
    control tokens in it are text. With --ignore-chat-template, and for models without a template, the text
    is read as it is and control tokens in it count. (The functions mlx_kvret.generate and stream_generate
    take text in this way.)

    Flags of mlx_lm.generate mean here what they mean there, or are refused by name.

    \b
    Examples:
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64 --verbose
      mlx-kvret generate --model demo --file demo --prompt "recall Stella" --budget 64 --policy recent
      mlx-kvret generate --model mlx-community/Qwen3-4B-4bit --gates ./gates --file book.txt \\
          --prompt "Who is the murderer?" --budget 256MB
      mlx-kvret generate --model ./qwen3-vl --image receipt.png --prompt "What did it cost?" --policy keydiff
      cat notes.txt | mlx-kvret generate --model ./model --gates ./gates --file -
      mlx-kvret generate --model ./model --prompts questions.jsonl > answers.jsonl
      mlx.launch -n 2 python -m mlx_kvret.generate --model ./model --file book.txt --prompt "Who?"
      torchrun --nproc-per-node 2 -m mlx_kvret.generate --model ./model --file book.txt --prompt "Who?"

    A line of --prompts is an object: {"prompt": "text"} or {"messages": [...]}, and if it likes "images"
    (a list of files, relative to the file of prompts), "budget", "max_tokens" and "id". Each answer is one
    line, what it would be alone, printed when it is complete.
    """
    from ..api import make_cache, stream_generate

    many, rows = options.pop("prompts"), options.pop("rows")
    if many is not None:
        check_stdin(many)
        check_many(options)
        return answer_many(many, 8 if rows is None else rows, options, shared.eviction(options))
    if rows is not None:
        raise ConfigError("--rows has no effect without --prompts; drop it, or give both")
    check_stdin(options["prompt"], options["file"], None if options["file"] or options["prompt"] else "-")
    text = prompt_text(options.pop("prompt"), options.pop("file"))
    saved = options.pop("cache")
    shared.check_cache_alone(context, saved, options)
    evict, verbose = shared.eviction(options), options.pop("verbose")
    draft, proposed = options.pop("draft_model"), options.pop("num_draft_tokens")
    check_draft(draft, proposed, options["backend"])
    images = [read_picture(file, f"--image {file}") for file in options.pop("image")]
    model, tokenizer = load(options)
    pictures = Pictures(model, required(tokenizer), images)
    if saved is None:
        prompt, answer = read_prompt(pictures, text, options)
        cache = make_cache(model, **evict)
    else:
        cache, prompt, answer = go_on(pictures, saved, text, options)
    loop: dict[str, Any] = draft_of(tokenizer, draft, proposed) | sampling(model, tokenizer, options)
    last = None
    with progress() as tell:
        for last in stream_generate(
            model,
            tokenizer,
            prompt,
            cache=cache,
            max_tokens=options["max_tokens"],
            prefill_step_size=options["prefill_step_size"],
            # mlx-lm's loop with a draft model tells nobody
            **loop | ({} if draft else {"prompt_progress_callback": tell}),
        ):
            say(f"{answer}{last.text}")
            answer = ""
    click.echo()
    cut_note(last, options["max_tokens"])
    if verbose and last is not None:
        note(stats_line(model, cache, last), err=True)


def check_many(options: dict[str, Any]) -> None:
    """Refuse what means nothing for many prompts; takes it out."""
    for name in MANY_WITHOUT:
        if options.pop(name):
            raise ConfigError(f"--{name.replace('_', '-')} does not work with --prompts; drop one of them")


def check_draft(draft: str | None, tokens: int | None, backend: str) -> None:
    """Refuse a draft model that cannot work, before a model is loaded."""
    from ..api import choose_backend

    if tokens is not None:
        if draft is None:
            raise ConfigError("--num-draft-tokens has no effect without --draft-model; drop it, or give both")
        whole("--num-draft-tokens", tokens, 1)
    if draft is not None and choose_backend(backend) != "mlx":
        raise ConfigError(
            "--draft-model works on MLX only; on torch, call model.generate(ids, cache=cache, "
            "assistant_model=...) of transformers from Python"
        )


def read_prompt(pictures: Pictures, text: str, options: dict[str, Any]) -> tuple[Any, str]:
    """What the model reads, and what its answer begins with; takes their options out.

    Raises:
        ConfigError: options of a chat template where none is used, or ones that it does not take.
    """
    from ..conversation import Transcript

    answer = options.pop("prefill_response")
    template = chosen_template(pictures.tokenizer, options, answer)
    system = options.pop("system_prompt")
    if template is None:
        if pictures.images:
            raise ConfigError(
                "--image needs the model's chat template; drop --ignore-chat-template, or --image"
            )
        return text, ""
    template = pictures.seeing(template)
    transcript = Transcript(template, system)
    return pictures.asked(template, text, lambda asked: transcript.plan(asked).new), answer or ""


def go_on(pictures: Pictures, saved: str, text: str, options: dict[str, Any]) -> tuple[Any, Any, str]:
    """A cache that was saved, what is read next, and what the answer begins with; takes their options out."""
    from ..reading import Reading

    answer = options.pop("prefill_response")
    template = chosen_template(pictures.tokenizer, options, answer)
    template = template if template is None else pictures.seeing(template)
    path = Path(saved).expanduser()
    reading = Reading.opened(pictures.model, pictures.tokenizer, path, template)
    if pictures.images and reading.transcript is None:
        raise ConfigError(f"--image needs a chat, and {saved} is a text that was read as it is; drop --image")
    return reading.cache, pictures.asked(template, text, reading.question_ids), answer or ""


def prompt_text(prompt: str | None, file: str | None) -> str:
    """The text to read: a file and then the prompt; without both what is piped in."""
    if prompt is None and file is None:
        if sys.stdin is not None and sys.stdin.isatty():
            raise ConfigError("there is nothing to read; give --prompt, --file, or pipe text in")
        prompt = "-"
    if prompt == file == "-":
        raise ConfigError("--prompt and --file are both standard input; give one of them as a text or a file")
    asked = read_text("-") if prompt == "-" else prompt
    parts = [part for part in (read_text(file) if file else None, asked) if part is not None]
    text = "\n\n".join(parts)
    if not text.strip():
        raise ConfigError("the prompt is empty; give at least one word")
    return text
