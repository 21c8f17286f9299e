"""``mlx-kvret inspect``: a page that shows what is kept of a text."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..core.plan import size
from ..core.sampling import SAMPLING
from ..errors import ConfigError
from ..texts import read_picture
from . import options as shared
from .generate import prompt_text, read_prompt
from .pictures import Pictures
from .read import check_target
from .screen import note, progress
from .session import chosen_template, load, required, sampling, say


@click.command("inspect")
@shared.model_options
@click.option("--file", help="Text to read first; '-' is stdin, 'demo' the demo's story of 4,096 tokens.")
@click.option("--prompt", "-p", help="What to ask about it; the answer is shown with the text.")
@shared.image_option
@click.option("--out", required=True, help="The page to write: page.html.")
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--prefill-step-size",
    type=int,
    help="Tokens read at a time, after which a compaction may come.  [default: half of the budget]",
)
@click.option("--chat-template-config", help="Variables of the model's chat template, as JSON.")
@click.option("--system-prompt", help="System message, where the model's chat template takes one.")
@shared.ignore_template_option
@shared.eviction_options
@shared.sampling_options
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    """Draw what a bounded cache keeps of a text, as a page for a browser.

    Every token is shaded by how many heads still hold it, over all layers and heads or in one of them; a
    slider goes through the compactions, and a gauge tells the memory beside that of a full cache. The page is
    one file that fetches nothing. It holds the text: give it only to whom you would give that.

    \b
    Examples:
      mlx-kvret inspect --model demo --file demo --prompt "recall Stella" --budget 64 --out page.html
      mlx-kvret inspect --model smollm2 --file book.txt --budget 512 --out book.html
      mlx-kvret inspect --model demo --file demo --budget 64 --policy recent --out recent.html
      mlx-kvret inspect --model ./qwen3-vl --image receipt.png -p "What did it cost?" --out receipt.html
    """
    prompt, file, out = options.pop("prompt"), options.pop("file"), check_target(options.pop("out"))
    step, opens = options.pop("prefill_step_size"), options.pop("opens")
    # a page that is given on tells no folders
    name = Path(options["model"]).name if Path(options["model"]).exists() else options["model"]
    images = [read_picture(one, f"--image {one}") for one in options.pop("image")]
    if images and prompt is None:
        raise ConfigError("--image goes with a question about it; give --prompt too")
    if prompt is None and file is None:
        raise ConfigError("there is nothing to read; give --file, --prompt, or both")
    if prompt is None:
        _refuse_drawing(context)
    text = prompt_text(prompt, file)
    evict = shared.eviction(options)
    model, tokenizer = load(options | {"prefill_step_size": 1 if step is None else step})
    from ..api import make_cache
    from ..inspecting import look

    ids = _ids(model, required(tokenizer), text, prompt is not None, images, options)
    loop = sampling(model, tokenizer, options)
    if prompt is not None:
        loop["max_tokens"] = options["max_tokens"]
    else:
        loop = {}
    cache = make_cache(model, **evict)
    with progress() as tell:
        found = look(model, tokenizer, ids, cache, prompt is not None, name, step, tell, **loop)
    if found.answer:
        say(found.answer, nl=True)
    found.save(out)
    now, full = found.history.now, found.data["full_bytes_per_token"]
    note(
        f"{now.seen:,} tokens, {size(now.nbytes)} of KV where a full cache takes {size(now.seen * full)}, "
        f"{len(found.history.compactions):,} compactions: {out}",
        err=True,
    )
    if opens and not webbrowser.open(Path(out).absolute().as_uri()):
        raise ConfigError(f"no browser was found to open {out}; open it yourself")


def _ids(
    model: Any, tokenizer: Any, text: str, asks: bool, images: list[Any], options: dict[str, Any]
) -> Any:
    """What is read: a message that is answered, or a text that nothing has been asked about yet."""
    from ..conversation import Transcript
    from ..core.prompts import prompt_ids

    if asks:
        pictures = Pictures(model, tokenizer, images)
        given, _ = read_prompt(pictures, text, options | {"prefill_response": None})
        return prompt_ids(tokenizer, given, True) if isinstance(given, str) else given
    template = chosen_template(tokenizer, options)
    system = options.pop("system_prompt")
    if template is None:
        return prompt_ids(tokenizer, text, True)
    return Transcript(template, system).plan_text(text).new


def _refuse_drawing(context: click.Context) -> None:
    """Without a prompt nothing is drawn."""
    for name in (*SAMPLING, "max_tokens"):
        if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} has no effect without --prompt; drop it, or give both")
