"""``mlx-kvret eval``."""

from __future__ import annotations

from pathlib import Path

import click

METHODS = ("full", "learned", "recent", "random", "knorm", "keydiff")


@click.command("eval")
@click.option("--model", required=True, help="Model folder, hub id (org/name), or a name: demo, smollm2.")
@click.option(
    "--gates",
    multiple=True,
    metavar="[LABEL=]FOLDER",
    help="Gates, repeatable; without any those known for the model. Several are training "
    "seeds of one method; labels a/0, a/1, b/0 tell kinds a and b apart.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="Task, repeatable; see below.  [default: facts for the demo, else needle-multikey]",
)
@click.option(
    "--length", "lengths", multiple=True, type=int, help="Tokens of text, repeatable.  [default: 1024]"
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    help="Tokens per KV head (64) or share of the text (1/16), repeatable.  [default: 1/4, 1/16, 1/64]",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    help=f"NAME or NAME:OPTION=VALUE,..., repeatable.  [default: {', '.join(METHODS)}]",
)
@click.option("--samples", default=20, show_default=True, help="Samples of each task and length.")
@click.option("--seed", default=0, show_default=True, help="Of the samples.")
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="auto, mlx, cuda, torch, or reference.",
    type=click.Choice(["auto", "mlx", "cuda", "torch", "reference"]),
)
@click.option("--chunk", type=int, help="Tokens read at a time.  [default: 32 for the demo, else 2048]")
@click.option(
    "--buffer", type=int, help="Tokens per head over the budget before a compaction.  [default: M/8]"
)
@click.option(
    "--batch", default=16, show_default=True, help="Texts the reference backend reads side by side."
)
@click.option("--chat", is_flag=True, help="Ask through the tokenizer's chat template.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Results file; what it holds already is not run again."
)
@click.option("--report", type=click.Path(path_type=Path), help="Markdown page; shown unless given.")
@click.option("--json", "summary_file", type=click.Path(path_type=Path), help="Means and errors as JSON.")
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Score against budget, .png or .svg."
)
@click.option(
    "--diagnose",
    "diagnosis_file",
    type=click.Path(path_type=Path),
    help="JSON: attention on useful entries and what is kept, by layer, head and position.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")  # fmt: skip
def command(
    model: str,
    gates: tuple[str, ...],
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
    budgets: tuple[str, ...],
    methods: tuple[str, ...],
    samples: int,
    seed: int,
    backend: str,
    chunk: int | None,
    buffer: int | None,
    batch: int,
    chat: bool,
    out: Path | None,
    report: Path | None,
    summary_file: Path | None,
    plot_file: Path | None,
    diagnosis_file: Path | None,
    quiet: bool,
) -> None:
    """Compare eviction policies with each other and with the full cache.

    \b
    Tasks in the demo's words: facts, bare, crowded, many, hostile, early, turns, copy.
    Tasks for any text model:  needle-single, needle-multikey, needle-multivalue,
      needle-multiquery, variable-tracking, key-value, common-words, multi-turn,
      perplexity:FILE, longbench:FILE, ruler:FILE, longmemeval:FILE.
    Methods: full, learned (also -layer, -head), recent, random, knorm, keydiff, and
      snapkv, h2o, oracle, which look at attention or answers and need torch.

    \b
    Examples:
      mlx-kvret eval --model demo
      mlx-kvret eval --model demo --length 2048 --budget 1/16 --budget 1/64 \\
        --method full --method learned --method learned-head --method snapkv \\
        --backend reference --samples 50 --out facts.json --plot facts.png
      mlx-kvret eval --model ./qwen3-4b --gates s/0=./gates-0 --gates s/1=./gates-1 \\
        --task needle-multikey --task perplexity:book.txt --length 16384 \\
        --budget 1024 --chat --out results.json --report results.md
    """
    from ..core.files import whole_file
    from ..evaluation import Grid, entries, markdown, open_bench, open_results, parse_methods, run_grid
    from ..evaluation.diagnostics import write_diagnosis
    from ..evaluation.plot import check_plot, plot
    from ..evaluation.report import write_summary

    demo = model == "demo"
    grid = Grid(
        tasks or (("facts",) if demo else ("needle-multikey",)),
        lengths or (1024,),
        budgets or ("1/4", "1/16", "1/64"),
        tuple(parse_methods(methods or METHODS)),
        samples,
        seed,
        chat,
    )
    if plot_file:
        check_plot(plot_file)
    step = chunk if chunk is not None else 32 if demo else 2048
    bench = open_bench(
        model, grid.methods, gates, backend, step, buffer, batch, look=diagnosis_file is not None
    )
    settings = bench.settings | {"samples": samples, "seed": seed, "chat": chat}
    results = open_results(out, settings, bench.digests)
    run_grid(grid, bench.engines, bench.gates, results, bench.tokenizer, progress=not quiet)

    page = markdown(results)
    if report:
        with whole_file(report) as scratch:
            scratch.write_text(page, encoding="utf-8")
    else:
        click.echo(page)
    if summary_file:
        write_summary(results, summary_file)
    if plot_file:
        plot(entries(results), plot_file)
    if diagnosis_file:
        write_diagnosis(bench, grid, diagnosis_file)
