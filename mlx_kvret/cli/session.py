"""What commands that run a model have in common: loading, prompts, progress, what is printed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..core.options import short
from ..core.picture_prompts import spoken_by
from ..core.plain import spoken
from ..core.prompts import has_chat_template
from ..core.sampling import SAMPLING, Sampling
from ..errors import ConfigError
from ..texts import MOST_BYTES
from . import ranks
from .ending import leaving_at_once
from .options import check_sampling, json_object
from .screen import note


def load(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer as a command's options say, which are taken out; it knows its processor, if any."""
    check_sampling(options)
    with leaving_at_once():
        from ..api import load

        gates = options.pop("gates")
        split = ranks.loading(options, options.pop("split", None))
        further = loading(options)
        model, tokenizer = load(
            options.pop("model"),
            None if gates == "none" else gates,
            backend=options.pop("backend"),
            **further | split,
        )
    tokenizer = None if tokenizer is None else spoken_by(tokenizer)
    add_stops(model, tokenizer, options.pop("extra_eos_token", ()))
    return model, tokenizer


def loading(options: dict[str, Any]) -> dict[str, Any]:
    """Options of :func:`mlx_kvret.load` beside model, gates, backend that were given; takes them out."""
    names = ("revision", "adapter_path", "trust_remote_code", "compile")
    named = {name: options.pop(name, None) for name in names}
    return {name: value for name, value in named.items() if value}


def add_stops(model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Have texts end with these tokens too."""
    if tokens:
        from ..api import backend_of

        backend_of(model).add_stop_tokens(model, tokenizer, [token_id(tokenizer, text) for text in tokens])


def token_id(tokenizer: Any, text: str) -> int:
    """The id of a token that was named by its text or, as in mlx-lm, by its id.

    Raises:
        ConfigError: there is no such token, or the text is several.
    """
    vocabulary = required(tokenizer).get_vocab()
    if text.isdecimal():
        if (found := int(text)) > max(vocabulary.values()):
            raise ConfigError(f"the model has no token {text}; its last is {max(vocabulary.values())}")
        return found
    ids = [vocabulary[text]] if text in vocabulary else tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"{short(text)} is {len(ids)} tokens of this model, not one; give a token's own text or its id"
        )
    return int(ids[0])


def required(tokenizer: Any) -> Any:
    """The tokenizer, where a command cannot do without."""
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer; from Python, give mlx_kvret.generate token ids")
    return tokenizer


def draft_of(tokenizer: Any, name: str | None, tokens: int | None) -> dict[str, Any]:
    """Options that have a smaller model of the same tokens propose some, for this one to check.

    Raises:
        ConfigError: it has other tokens, or none.
    """
    if name is None:
        return {}
    from ..api import detach, load

    draft, spoken = load(name, None, backend="mlx")
    own, other = required(tokenizer).get_vocab(), {} if spoken is None else spoken.get_vocab()
    if any(other.get(text, own[text]) != own[text] for text in own) or not own.keys() & other.keys():
        raise ConfigError(f"the draft model {name} has other tokens than the model; give one of its family")
    return {"draft_model": detach(draft), "num_draft_tokens": 3 if tokens is None else tokens}


def template_of(tokenizer: Any, options: dict[str, Any], answer: str = "") -> Any:
    """The model's chat template with the ``chat_template_config`` that was given, which is taken out."""
    from ..chat_template import Template

    settings = json_object("--chat-template-config", options.pop("chat_template_config"), "{}")
    return Template(tokenizer, settings, answer)


def chosen_template(tokenizer: Any, options: dict[str, Any], answer: str | None = None) -> Any:
    """The chat template to read with, or None: there is none, or it is to be ignored; takes its options out.

    Raises:
        ConfigError: options of a chat template where none is used.
    """
    ignored, known = options.pop("ignore_chat_template"), has_chat_template(tokenizer)
    if known and not ignored:
        return template_of(tokenizer, options, answer or "")
    settings, system = options.pop("chat_template_config"), options.get("system_prompt")
    given = {"--system-prompt": system, "--prefill-response": answer, "--chat-template-config": settings}
    if lost := [flag for flag, value in given.items() if value is not None]:
        why = "drop --ignore-chat-template" if known else "this model has none"
        raise ConfigError(f"{lost[0]} needs a chat template ({why}); write it into the prompt instead")
    return None


def sampling(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Generation options of the model's backend from those of drawing tokens, which are taken out."""
    from ..api import backend_of

    found: dict[str, Any] = backend_of(model).sampling(model, asked_sampling(model, tokenizer, options))
    return found


def asked_sampling(model: Any, tokenizer: Any, options: dict[str, Any]) -> Sampling:
    """How tokens are to be drawn, from a command's options, which are taken out."""
    from ..api import backend_of

    given = {name: options.pop(name) for name in SAMPLING if name in options}
    bias = json_object("--logit-bias", given.pop("logit_bias", None), "{}")
    by_id = {token_id(tokenizer, text): added for text, added in bias.items()}
    if len(by_id) < len(bias):
        raise ConfigError("--logit-bias names a token twice, by its text and its id; name it once")
    if given.get("xtc_probability"):
        # what mlx_lm.generate never excludes
        lines = tokenizer.encode("\n", add_special_tokens=False)
        stops = backend_of(model).stop_tokens(model, tokenizer)
        given["xtc_special_tokens"] = [*map(int, lines), *stops]
    return Sampling(**given, logit_bias=by_id or None)


def drawn(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """:func:`asked_sampling` as options of the public functions, as far as they are not the defaults."""
    asked = asked_sampling(model, tokenizer, options)
    values = {field.name: (getattr(asked, field.name), field.default) for field in dataclasses.fields(asked)}
    return {name: value for name, (value, default) in values.items() if value != default}


def read_line(prompt: str) -> str | None:
    """A line typed or piped in, None at the end.

    Raises:
        ConfigError: the line is no UTF-8; the next one can be read.
    """
    if sys.stdin.isatty():
        try:
            return input(prompt)
        except EOFError:
            click.echo()
            return None
        except UnicodeDecodeError as error:
            raise ConfigError(f"the line is not UTF-8 ({error.reason}); set the terminal to UTF-8") from error
    click.echo(prompt, nl=False)
    line = sys.stdin.buffer.readline(MOST_BYTES)
    if not line:
        click.echo()
        return None
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the line is not UTF-8 ({error.reason}); convert what is piped in") from error


def say(text: str, nl: bool = False) -> None:
    """Print what a model says: its line breaks and tabs, but no control character that a terminal obeys."""
    click.echo(spoken(text), nl=nl)


def cut_note(last: Any, max_tokens: int) -> None:
    """Say on stderr that an answer did not end by itself."""
    if last is not None and last.finish_reason == "length":
        note(f"[cut by --max-tokens {max_tokens}]", err=True)


def stats_line(model: Any, cache: Any, last: Any) -> str:
    """The closing line: speed, tokens kept per head, and the memory of this cache and of a full one."""
    from ..api import backend_of

    backend = backend_of(model)
    heads, full = backend.full_cache(model, cache)
    return (
        f"[{last.prompt_tokens} prompt tokens at {last.prompt_tps:.0f}/s, "
        f"{last.generation_tokens} generated at {last.generation_tps:.1f}/s; "
        f"kept {cache.entries / heads:,.0f} of {cache.seen:,} tokens per head; "
        f"{cache.nbytes / 1e6:.2f} MB of KV allocated, by a full cache {full / 1e6:.2f} MB]"
    )
