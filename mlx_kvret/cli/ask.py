"""``mlx-kvret ask``: many questions about one reading, each as if it were the only one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..core.files import whole_file
from ..core.options import whole
from ..core.plain import spoken
from ..errors import ConfigError
from ..texts import read_text
from . import options as shared
from .ranks import check_stdin, first
from .read import check_target
from .screen import note, progress
from .session import chosen_template, drawn, load, required


@click.command("ask")
@click.argument("questions", required=False, metavar="[QUESTIONS]")
@shared.model_options
@click.option("--cache", help="A reading, or a chat, that was saved in this file.")
@click.option("--file", multiple=True, help="Text to read first, repeatable; 'demo' is the demo's story.")
@click.option("--question", multiple=True, help="A question, repeatable.")
@click.option(
    "--rows", type=int, default=16, show_default=True, help="Questions answered at a time; 1 is one by one."
)
@click.option("--output", help="File for the answers: lines of JSON if its name ends in .jsonl, else text.")
@shared.prompt_options
@shared.ignore_template_option
@shared.eviction_options
@shared.sampling_options
@shared.split_option
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    """Ask many questions about one reading; none disturbs the next.

    QUESTIONS is a text file with a question in each line, '-' standard input. Every question is asked of a
    copy of the cache, so that its answer is what it would be without the others.

    \b
    Examples:
      mlx-kvret ask --model demo --file demo --budget 64 --question "recall Stella"
      mlx-kvret ask --model smollm2 --cache notes.kv questions.txt --output answers.jsonl
    """
    from ..api import make_cache
    from ..reading import Reading, joined

    saved, files, output, rows = (options.pop(name) for name in ("cache", "file", "output", "rows"))
    whole("rows", rows, 1)
    check_stdin(options["questions"], *files)
    asked = questions(options.pop("questions"), options.pop("question"))
    target = None if output is None else check_target(output)
    if (saved is None) == (not files):
        raise ConfigError("give --cache, a reading that was saved, or --file, a text to be read; one of them")
    shared.check_cache_alone(context, saved, options)
    text = joined([read_text(file) for file in files]) if files else ""
    evict = shared.eviction(options)
    model, tokenizer = load(options)
    template, system = chosen_template(required(tokenizer), options), options.pop("system_prompt")
    draw = drawn(model, tokenizer, options)
    draw |= {name: options[name] for name in ("max_tokens", "prefill_step_size")}
    if saved is not None:
        reading = Reading.opened(model, tokenizer, Path(saved).expanduser(), template)
    else:
        cache = make_cache(model, **evict)
        reading = Reading.begun(model, tokenizer, cache, system, template is None, template)
        with progress() as tell:
            reading.read(text, draw["prefill_step_size"], tell)
    answers, cut = [], 0
    with progress("asking", "questions") as tell:
        for done, (question, made) in enumerate(
            zip(asked, reading.answers(asked, rows, **draw), strict=True)
        ):
            finished = made.finish_reason == "stop"
            cut += not finished
            answers.append({"question": question, "answer": made.text, "complete": finished})
            if target is None:
                click.echo(spoken(shown(question, made.text, done)))
            else:
                tell(done + 1, len(asked))
        tell(len(asked), len(asked))
    if target is not None and first():
        write(target, answers)
    if cut:
        note(f"[{cut} of {len(asked)} answers cut by --max-tokens {draw['max_tokens']}]", err=True)


def questions(file: str | None, given: tuple[str, ...]) -> list[str]:
    """The questions: each line of a file, and those of the command line.

    Raises:
        ConfigError: there are none, or one is empty.
    """
    lines = [] if file is None else [line.strip() for line in read_text(file).split("\n")]
    found = [line for line in lines if line]
    if any(not question.strip() for question in given):
        raise ConfigError("--question is empty; give at least one word")
    if not (found or given):
        where = "there are no questions" if file is None else f"there is no question in {file}"
        raise ConfigError(f"{where}; give a file with a question in each line, or --question")
    return [*found, *given]


def shown(question: str, answer: str, place: int) -> str:
    """A question and its answer as text, behind a blank line unless it is the first."""
    return ("\n" if place else "") + f"> {question}\n{answer.strip()}"


def write(target: Path, answers: list[dict[str, Any]]) -> None:
    """All answers to a file, as its name says, whole or not at all."""
    if target.suffix == ".jsonl":
        lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    else:
        lines = [shown(answer["question"], answer["answer"], n) for n, answer in enumerate(answers)]
    with whole_file(target) as scratch:
        scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
