"""``mlx-kvret serve``: an OpenAI-compatible server whose memory is bounded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from ..core.budget import parse_budget
from ..core.picture_prompts import spoken_by
from ..errors import ConfigError, MissingDependencyError
from . import options as shared
from . import ranks
from .ending import leaving_at_once
from .session import loading, note

NEEDED = ("starlette", "uvicorn", "pydantic")


@click.command("serve")
@shared.model_options
@shared.compile_option
@shared.eviction_options
@shared.split_option
@click.option("--memory", help="For all KV caches: 8GB.  [default: half of what is free]")
@click.option(
    "--rows",
    type=int,
    default=16,
    show_default=True,
    help="Most conversations at once, if so many fit into --memory.",
)
@click.option("--queue", type=int, default=64, show_default=True, help="Most requests that wait for room.")
@click.option("--chunk", type=int, default=2048, show_default=True, help="Tokens of a prompt read at a time.")
@click.option(
    "--prompt-cache",
    help="Part of --memory for prompts to go on from: 1GB; 0B for none.  [default: a quarter]",
)
@click.option(
    "--prompt-cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder in which such prompts outlive the server.",
)
@click.option("--prompt-cache-disk", help="What the folder may take.  [default: 20GB]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=int, default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    envvar="MLX_KVRET_API_KEY",
    help="What clients must send; needed where other machines reach the server. "
    "Better in the environment: MLX_KVRET_API_KEY.",
)
@click.option("--allow-host", multiple=True, help="Another name by which clients call this server.")
@click.option("--cors-origin", multiple=True, help="Web pages that may use it: https://example.org.")
@click.option("--served-name", help="Name under which clients ask for the model.  [default: --model]")
@click.option(
    "--temp",
    type=float,
    default=0.0,
    show_default=True,
    help="Temperature of requests that say none; 0 is greedy.",
)
@click.option("--max-tokens", type=int, default=4096, show_default=True, help="Most tokens of an answer.")
@click.option("--max-prompt", type=int, default=1_000_000, show_default=True, help="Most tokens of a prompt.")
@click.option(
    "--timeout", type=float, default=3600.0, show_default=True, help="Seconds a request may take in all."
)
@click.option(
    "--drain",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that requests may go on after SIGTERM or ctrl-C.",
)
@click.option(
    "--page/--no-page",
    default=True,
    show_default=True,
    help="A page at / to talk to the model and to see what it remembers.",
)
def command(**options: Any) -> None:
    """Serve a model to OpenAI's clients within a fixed KV memory.

    Every conversation takes the same memory, however long it is, so how many fit is known at the start: the
    others wait, and none is ever thrown out for another.

    \b
    Examples:
      mlx-kvret serve --model demo --budget 64 --memory 100MB
      mlx-kvret serve --model ./qwen3-4b --gates ./gates --budget 1024 --memory 8GB
      mlx.launch -n 2 python -m mlx_kvret serve --model ./large --memory 16GB
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
          -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise MissingDependencyError(
            f"{', '.join(lacking)} not installed; run `pip install 'mlx-kvret[serve]'`"
        )
    evict = shared.eviction(options)
    sizes = {name: _size(name, options.pop(name)) for name in ("memory", "prompt_cache", "prompt_cache_disk")}
    with leaving_at_once():
        from ..api import load
        from ..serving.server import Serving
        from ..serving.settings import Settings
        from ..serving.starting import Room, serve_along, start

        if sizes["prompt_cache_disk"] is not None and options["prompt_cache_dir"] is None:
            raise ConfigError("--prompt-cache-disk has no effect without --prompt-cache-dir; give both")
        disk = {} if sizes["prompt_cache_disk"] is None else {"disk": sizes["prompt_cache_disk"]}
        room = Room(
            sizes["memory"], options["rows"], options["chunk"], sizes["prompt_cache"],
            options["prompt_cache_dir"], **disk,
        )  # fmt: skip
        settings = Settings(
            options["served_name"] or options["model"],
            options["host"],
            options["port"],
            options["api_key"],
            options["allow_host"],
            options["cors_origin"],
            options["queue"],
            options["max_tokens"],
            options["max_prompt"],
            options["temp"],
            options["timeout"],
            options["drain"],
            page=options["page"],
        )
        gates, split = options["gates"], ranks.loading(options, options["split"])
        model, tokenizer = load(
            options["model"],
            None if gates == "none" else gates,
            backend=options["backend"],
            **split,
            **_half(options["model"], options["backend"], options["revision"]),
            **loading(options),
        )
        given = model, spoken_by(tokenizer), evict
        made = start(*given, settings, room) if ranks.first() else None
    if made is None:
        serve_along(*given, room)
        return
    service, planned = made
    held = "" if service.backend.ranks is None else f", over {service.backend.ranks.size} processes"
    note(f"{planned}{held}", err=True)

    def ready(address: str) -> None:
        page = f", a page to talk to it at {address}/" if settings.page else ""
        note(f"{settings.model} at {address}/v1{page} (ctrl-C ends)", err=True)

    Serving(service, ready).run_until_told()


def _half(model: str, backend: str, revision: str | None) -> dict[str, Any]:
    """Options that load what is served of a vision-language model: its text half, where MLX lacks mlx-vlm."""
    from ..api import choose_backend
    from ..core.installed import command_for, installed
    from ..core.model_folder import model_config
    from ..core.vision import has_vision
    from ..hub import resolve

    if choose_backend(backend) != "mlx" or not has_vision(model_config(resolve(model, "model", revision))):
        return {}
    if installed("vlm"):
        return {}
    note(
        f"[pictures need {command_for('vlm')}: without it the text half of {model} answers]",
        err=True,
    )
    return {"text_only": True}


def _size(name: str, text: str | None) -> int | None:
    """Bytes of a size such as 8GB."""
    if text is None:
        return None
    option = f"--{name.replace('_', '-')}"
    if text.strip().upper() == "0B":
        return 0
    try:
        _, size = parse_budget(text)
    except ConfigError:
        size = None
    if size is None:
        raise ConfigError(f"{option} is {text!r}; expected a size, as 8GB or 500MB")
    return size
