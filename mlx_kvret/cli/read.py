"""``mlx-kvret read``: a long text read once and saved, to be asked about or talked about later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.plan import size
from ..errors import ConfigError
from ..texts import read_text
from . import options as shared
from .ranks import check_stdin
from .screen import note, progress
from .session import chosen_template, load, required


@click.command("read")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@shared.model_options
@click.option("--save", required=True, help="File to write: the cache, and what it has read.")
@shared.reading_options
@shared.ignore_template_option
@shared.eviction_options
@shared.split_option
def command(**options: Any) -> None:
    """Read text files within a fixed KV budget, and save what is remembered.

    FILE is text in UTF-8, '-' standard input, 'demo' the demo's story; several are read one after another.
    They are read through the model's chat template, if it has one, as the beginning of a message. The file
    that is saved goes on in `generate --cache`, `ask --cache` and `chat --cache`, on either backend; `info`
    shows what it holds.

    \b
    Examples:
      mlx-kvret read --model demo demo --budget 64 --save story.kv
      mlx-kvret read --model smollm2 book.txt notes.txt --budget 512 --save notes.kv
      pdftotext paper.pdf - | mlx-kvret read --model smollm2 - --save paper.kv
    """
    from ..api import make_cache, save_cache
    from ..reading import Reading, joined

    files, target = options.pop("files"), check_target(options.pop("save"))
    check_stdin(*files)
    if files.count("-") > 1:
        raise ConfigError("standard input can be read once; give '-' once")
    text = joined([read_text(file) for file in files])
    evict, step = shared.eviction(options), options["prefill_step_size"]
    if evict.get("policy") == "full":
        raise ConfigError(
            "a cache of policy full is the backend's own, and not saved; choose another policy, or a budget "
            "larger than the text"
        )
    model, tokenizer = load(options)
    template, system = chosen_template(required(tokenizer), options), options.pop("system_prompt")
    cache = make_cache(model, **evict)
    reading = Reading.begun(model, tokenizer, cache, system, template is None, template)
    with progress(after=0) as tell:
        tokens = reading.read(text, step, tell)
    save_cache(model, cache, target, reading.notes())
    note(f"read {tokens:,} tokens into {size(cache.nbytes)}, saved to {target}", err=True)


def check_target(name: str) -> Path:
    """Where something is to be saved.

    Raises:
        ConfigError: there is no such folder, told before the work is done.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"cannot save to {path}: it is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot save to {path}: there is no folder {path.parent}; make it first")
    return path
