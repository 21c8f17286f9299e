"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from ..core.bits import CHOICES
from ..core.config import Policy, Scope
from ..core.options import short, whole
from ..core.request import EVICTION, check_eviction, check_max_tokens
from ..core.sampling import SAMPLING, Sampling
from ..errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """``--model --gates --backend`` and what else says what is loaded."""
    for option in (
        click.option("--adapter-path", help="Folder or hub id of an adapter that mlx-lm has trained."),
        click.option("--trust-remote-code", is_flag=True,
                     help="Run the Python code that the model's folder brings."),
        click.option("--revision", help="Branch, tag or commit of the model's hub repository."),
        click.option("--backend", default="auto", show_default=True,
                     type=click.Choice(["auto", "mlx", "cuda", "torch"]), help="What runs the model."),
        click.option("--gates", default="auto", show_default=True,
                     help="Folder or hub id of the retention gates; auto: those known for the model; none."),
        click.option("--model", required=True,
                     help="Model folder, hub id (org/name), or a name: demo, smollm2."),
    ):  # fmt: skip
        function = option(function)
    return function


def eviction_options(function: F) -> F:
    """``--budget`` and what else decides what is kept; collected by :func:`eviction`.

    Gates may carry defaults of their own for what is not given.
    """
    for option in (
        click.option("--policy-seed", type=int, help="Of the random policy."),
        click.option("--kv-bits", type=click.Choice(CHOICES),
                     help="Bits of kept keys and values; k8v4: keys in 8, values in 4.  [default: 16, which "
                     "is the model's own float type]"),
        click.option("--threshold", type=float,
                     help="Drop entries of less predicted use than this even within the budget; try 1e-6. "
                     "0: none, whatever the gates' own default is."),
        click.option("--lookahead", type=int, help="Steps over which future use is summed.  [default: 1]"),
        click.option("--window", type=int,
                     help="Most recent positions, never evicted.  [default: the gates' own]"),
        click.option("--sinks", type=int, help="First positions, never evicted.  [default: the gates' own]"),
        click.option("--min-per-head", type=int,
                     help="Entries that every head keeps first.  [default: the gates' own]"),
        click.option("--picture-share", type=float,
                     help="Part of the budget that is the pictures', with --scope modality.  [default: 0.5]"),
        click.option("--scope", type=click.Choice(get_args(Scope)),
                     help="Who competes.  [default: the gates' own, else global]"),
        click.option("--policy", type=click.Choice(get_args(Policy)), default="learned", show_default=True,
                     help="What decides who stays."),
        click.option("--buffer", type=int, help="Tokens per head over the budget before a compaction."
                     "  [default: budget/8]"),
        click.option("--budget", default="1024", show_default=True,
                     help="Tokens per KV head, or memory: 256MB, 1.5GiB."),
    ):  # fmt: skip
        function = option(function)
    return function


def eviction(options: dict[str, Any]) -> dict[str, Any]:
    """Take the eviction options that were given out of a command's keywords; a threshold of 0 is none.

    Raises:
        ConfigError: options that cannot work, told before a model is loaded.
    """
    found = {name: options.pop(name) for name in EVICTION if name in options}
    given = {name: value for name, value in found.items() if value is not None}
    given |= {"threshold": None} if given.get("threshold") == 0 else {}
    check_eviction(given)
    return given


def sampling_options(function: F) -> F:
    """``--max-tokens`` and how the next token is drawn."""
    for option in (
        click.option("--logit-bias", help="What is added to the logits of tokens, by id or text, as JSON: "
                     '\'{"42": -100, "Yes": 5}\'.'),
        click.option("--repetition-context-size", type=int, default=20, show_default=True,
                     help="Tokens of prompt and answer that --repetition-penalty looks back at."),
        click.option("--repetition-penalty", type=float,
                     help="Divide the logits of tokens that were there; 1.1 is usual."),
        click.option("--seed", type=int, help="Make sampling repeatable."),
        click.option("--xtc-threshold", type=float, default=0.1, show_default=True,
                     help="Probability from which on a token is a choice that XTC may exclude."),
        click.option("--xtc-probability", type=float, default=0.0, show_default=True,
                     help="How often all choices but the least likely are excluded (XTC)."),
        click.option("--top-k", type=int, default=0, show_default=True,
                     help="Draw from this many of the likeliest tokens; 0 is all."),
        click.option("--min-tokens-to-keep", type=int, default=1, show_default=True,
                     help="Likeliest tokens that --min-p never leaves out."),
        click.option("--min-p", type=float, default=0.0, show_default=True,
                     help="Leave out tokens less likely than this share of the likeliest."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling."),
        click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy."),
        click.option("--max-tokens", "-m", type=int, default=256, show_default=True, help="Most new tokens."),
    ):  # fmt: skip
        function = option(function)
    return function


def check_cache_alone(context: click.Context, cache: str | None, options: dict[str, Any]) -> None:
    """Refuse options that a saved cache has decided already.

    Raises:
        ConfigError: names one that was given.
    """
    if cache is None:
        return
    given = [
        name for name in EVICTION if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
    ]
    # these may have come by an older name
    given += [name for name in ("system_prompt", "ignore_chat_template") if options.get(name)]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise ConfigError(f"{flag} was decided when {cache} was read; drop it, or read the text again")


def check_sampling(options: dict[str, Any]) -> None:
    """Refuse what cannot work of :func:`sampling_options` and :func:`prompt_options`, before a model is
    loaded; commands may have some of them only.

    Raises:
        ConfigError: names the option.
    """
    Sampling(**{name: options[name] for name in SAMPLING if name in options and name != "logit_bias"})
    json_object("--logit-bias", options.get("logit_bias"), '{"42": -100}')
    json_object("--chat-template-config", options.get("chat_template_config"), '{"enable_thinking": false}')
    if "max_tokens" in options:
        check_max_tokens(options["max_tokens"])
    if "prefill_step_size" in options:
        whole("--prefill-step-size", options["prefill_step_size"], 1)


def prompt_options(function: F) -> F:
    """How a prompt becomes tokens, how they are read, and what ends the answer."""
    stops = click.option(
        "--extra-eos-token",
        multiple=True,
        cls=Several,
        help="Token that ends an answer too, by its text or id; as many as there are.",
    )
    return reading_options(stops(function))


def reading_options(function: F) -> F:
    """How a text becomes tokens, and how they are read."""
    for option in (
        click.option("--prefill-step-size", type=int, default=2048, show_default=True,
                     help="Tokens of the prompt read at a time."),
        click.option("--chat-template-config", help="Variables of the model's chat template, as JSON: "
                     "'{\"enable_thinking\": false}'."),
        click.option("--system-prompt", help="System message, where the model's chat template takes one."),
    ):  # fmt: skip
        function = option(function)
    return function


def image_option(function: F) -> F:
    """``--image``, as of mlx-lm: every word up to the next option."""
    text = "Picture for a vision-language model, a file ('demo' comes with the package); repeatable. "
    text += "They come first, or where the text says <image>."
    return click.option("--image", multiple=True, cls=Several, help=text)(function)


def compile_option(function: F) -> F:
    """``--compile``, of :func:`mlx_kvret.load` on torch."""
    text = "Have torch fuse the kernels of a decoding step, on a GPU; takes a minute at the first answer."
    return click.option("--compile", is_flag=True, help=text)(function)


def split_option(function: F) -> F:
    """``--split``, of a model that several processes hold."""
    text = "What several processes share; see docs/ranks.md.  [default: heads]"
    return click.option("--split", type=click.Choice(["heads", "layers"]), help=text)(function)


def ignore_template_option(function: F) -> F:
    """``--ignore-chat-template``."""
    text = "Take the text as it is, without the model's chat template."
    return click.option("--ignore-chat-template", is_flag=True, help=text)(function)


class Several(click.Option):
    """An option that takes every word up to the next option, as argparse's ``nargs="+"`` does."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        option = parser._long_opt[self.opts[0]]
        take = option.process

        def take_all(value: Any, state: Any) -> None:
            take(value, state)
            while state.rargs and not state.rargs[0].startswith("-"):
                take(state.rargs.pop(0), state)

        option.process = take_all


def json_object(flag: str, text: str | None, example: str) -> dict[str, Any]:
    """What a flag was given as JSON; empty if it was not given.

    Raises:
        ConfigError: it is no JSON, or no object.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} is no JSON ({error}); give an object such as '{example}'") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{flag} is {short(found)}; expected a JSON object such as '{example}'")
    return found
