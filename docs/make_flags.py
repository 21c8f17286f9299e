"""The tables of mlx_lm_flags.md, made from mlx-lm's parsers and functions and from our commands.

python docs/make_flags.py            writes mlx_lm_flags.md, between its two marks
python docs/make_flags.py --check    only says whether it is what would be written
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import click
from mlx_lm.chat import setup_arg_parser as chat_parser
from mlx_lm.generate import setup_arg_parser as generate_parser
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_kvret.cli.chat import command as chat
from mlx_kvret.cli.generate import command as generate
from mlx_kvret.cli.habits import REFUSED, RENAMED, SHORT
from mlx_kvret.core.sampling import SAMPLING

PAGE = Path(__file__).parent / "mlx_lm_flags.md"
BEGIN, END = "<!-- made by docs/make_flags.py -->", "<!-- end -->"
UNKNOWN = object()
# what a flag that has the same name here does otherwise
DIFFERS = {
    "--model": "required; also the names `demo` and `smollm2`",
    "--prompt": "taken as it is typed: `\\n` and `\\t` are not replaced; without it, what is piped in",
    "--adapter-path": "on MLX; merge an adapter into its model for torch",
    "--extra-eos-token": "a word that is no token of the model is refused",
    "--system-prompt": "refused where the chat template has no place for it; `chat` reads it once",
    "--prefill-response": "shown as the beginning of the answer",
    "--temp": "on MLX applied after tokens are left out, as in mlx-lm; on torch before, as in transformers",
    "--top-p": "from 0.001 to 1; refused, as all that follows a draw, where a `--temp` of 0 draws nothing",
    "--seed": "none unless given; refused where a `--temp` of 0 draws nothing",
    "--chat-template-config": "a variable that the template does not know is refused",
    "--verbose": "`true`, `t`, `false`, `f` or nothing, which is true; one line on stderr",
    "--draft-model": "on MLX; its tokens must be the model's",
    "--num-draft-tokens": "refused without `--draft-model`",
}


def theirs() -> dict[str, dict[str, Any]]:
    """Flags of mlx_lm.generate and mlx_lm.chat: the commands each is of, with its default there."""
    found: dict[str, dict[str, Any]] = {}
    for command, parser in (("generate", generate_parser), ("chat", chat_parser)):
        for action in parser()._actions:
            if not isinstance(action, argparse._HelpAction):
                for flag in action.option_strings:
                    found.setdefault(flag, {})[command] = action.default
    return found


def ours(command: click.Command) -> dict[str, Any]:
    """Flags that a command of ours takes and shows, with their defaults; :data:`UNKNOWN` if none is told."""
    found: dict[str, Any] = {}
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            elsewhere = option.required or "[default:" in (option.help or "")
            default = option.default if isinstance(option.default, (bool, int, float, str)) else None
            found |= dict.fromkeys(option.opts, UNKNOWN if elsewhere else default)
    return found


def unaccounted() -> list[str]:
    """Flags of mlx-lm that are neither taken nor refused with a reason; and reasons for flags it has not."""
    taken = ours(generate) | ours(chat)
    lost = [flag for flag in theirs() if flag not in taken and flag not in (*REFUSED, *SHORT.values())]
    extra = [flag for flag in (*REFUSED, *DIFFERS) if flag not in theirs()]
    both = [flag for flag in REFUSED if flag in taken]
    return lost + extra + both


def tables() -> str:
    """The generated part of the page."""
    here = {"generate": ours(generate), "chat": ours(chat)}
    lines = ["### Taken", "", "| flag | mlx-lm's | ours | what differs |", "|---|---|---|---|"]
    for flag, defaults in theirs().items():
        if flag.startswith("--") and flag not in REFUSED:
            places = ", ".join(name for name, known in here.items() if flag in known)
            said = _differs(flag, defaults, here)
            lines.append(f"| `{flag}` | {', '.join(defaults)} | {places} | {said} |")
    lines += ["", "### Refused, with these words", "", "| flag | mlx-lm's | why |", "|---|---|---|"]
    lines += [f"| `{flag}` | {', '.join(theirs()[flag])} | {why} |" for flag, why in REFUSED.items()]
    lines += ["", "### In Python", "", "| option | mlx-lm's | flag here |", "|---|---|---|"]
    for maker in (make_sampler, make_logits_processors):
        for name in inspect.signature(maker).parameters:
            assert name in SAMPLING, f"{name} of {maker.__name__} is missing in Sampling"
            flag = f"--{name.replace('_', '-')}"
            lines.append(
                f"| `{name}` | {maker.__name__} | {f'`{flag}`' if flag in here['generate'] else ''} |"
            )
    lines += ["", "### Older names", "", "| once | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    return "\n".join(lines)


def _differs(flag: str, defaults: dict[str, Any], here: dict[str, dict[str, Any]]) -> str:
    said = [DIFFERS[flag]] if flag in DIFFERS else []
    for command, default in defaults.items():
        own = here[command].get(flag)
        if flag in here[command] and own is not UNKNOWN and own != default and (own or default):
            said.append(f"default in {command} {_shown(own)}, in mlx-lm {_shown(default)}")
    return "; ".join(dict.fromkeys(said))


def _shown(default: Any) -> str:
    return "none" if default is None else f"`{default}`"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    made = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"
    if lost := unaccounted():
        sys.exit(f"{', '.join(lost)}: take it in mlx_kvret/cli/options.py, or give a reason in cli/habits.py")
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(made, encoding="utf-8")
    elif page != made:
        sys.exit(f"{PAGE} is stale; run `python docs/make_flags.py`")


if __name__ == "__main__":
    main()
