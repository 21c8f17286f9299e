"""``mlx-kvret eval``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError

METHODS = ("full", "learned", "recent", "random", "knorm", "keydiff")


@dataclass(frozen=True)
class Run:
    """The options that decide what is run; a results file keeps them for ``--resume``."""

    model: str | None
    gates: tuple[str, ...]
    tasks: tuple[str, ...]
    data: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    samples: int
    seed: int
    backend: str
    dtype: str
    chunk: int | None
    buffer: int | None
    batch: int
    chat: bool

    @classmethod
    def kept(cls, results: Any) -> Run:
        """The run that wrote a results file."""
        names = {field.name for field in fields(cls)}
        if set(results.run) != names:
            raise ConfigError(
                f"{results.path} does not say how it was made; give the options again, with --out"
            )
        found: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in results.run.items()}
        return cls(**found)


@click.command("eval")
@click.option("--model", help="Model folder, hub id (org/name), or a name: demo, demo-vision, smollm2.")
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
    help="Task, repeatable; see below.  "
    "[default: text with --data, else facts for the demo, albums for demo-vision and needle-multikey]",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Text file for task text, repeatable: pieces of each length are drawn from the files in turn.",
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
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="Of weights and cache; auto is what the model's files hold.",
    type=click.Choice(["auto", "float32", "bfloat16"]),
)
@click.option("--chunk", type=int, help="Tokens read at a time.  [default: half the budget, at most 512]")
@click.option(
    "--buffer", type=int, help="Tokens per head over the budget before a compaction.  [default: M/8]"
)
@click.option(
    "--batch",
    default=16,
    show_default=True,
    help="Texts read side by side, by backend reference and, if only scored, by torch and cuda.",
)
@click.option("--chat", is_flag=True, help="Ask through the tokenizer's chat template.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Results file; what it holds already is not run again."
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Go on with the run that wrote this results file; its options are in there.",
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
@click.option("--quiet", is_flag=True, help="No progress bar or lines.")
@click.pass_context
def command(
    context: click.Context,
    out: Path | None,
    resume: Path | None,
    report: Path | None,
    summary_file: Path | None,
    plot_file: Path | None,
    diagnosis_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare eviction policies with each other and with the full cache.

    \b
    Tasks in the demo's words: facts, bare, crowded, many, hostile, early, turns, copy.
    Pictures and words of demo-vision: albums, and with so many facts seen and told
      albums-16-0, albums-12-4, albums-8-8, albums-4-12, albums-0-16.
    Tasks for any text model:  needle-single, needle-multikey, needle-multivalue,
      needle-multiquery, variable-tracking, key-value, common-words, multi-turn,
      text (with --data), perplexity:FILE, longbench:FILE, ruler:FILE, longmemeval:FILE.
    Methods: full, learned (also -layer, -head), recent, random, knorm, keydiff, and
      snapkv, h2o, oracle, which look at attention or answers and need torch. Those
      without gates protect at least as many sinks as the learned ones.
    Cells in which nothing would be evicted are refused.

    \b
    Examples:
      mlx-kvret eval --model demo
      mlx-kvret eval --model demo --length 2048 --budget 1/16 --budget 1/64 \\
        --method full --method learned --method learned-head --method snapkv \\
        --backend reference --samples 50 --out facts.json --plot facts.png
      mlx-kvret eval --model ./qwen3-4b --gates s/0=./gates-0 --gates s/1=./gates-1 \\
        --task needle-multikey --task text --data book.txt --data manual.txt \\
        --length 16384 --budget 1024 --out results.json --report results.md
      mlx-kvret eval --resume results.json --report results.md
    """
    from ..core.files import whole_file
    from ..evaluation import entries, markdown
    from ..evaluation.diagnostics import write_diagnosis
    from ..evaluation.plot import check_plot, plot
    from ..evaluation.report import write_summary

    run, out = _chosen(context, Run(**options), out, resume)
    if plot_file:
        check_plot(plot_file)
    bench, grid, results = _prepared(run, out, diagnosis_file is not None)
    _carried_out(bench, grid, results, not quiet)

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


def _chosen(
    context: click.Context, run: Run, out: Path | None, resume: Path | None
) -> tuple[Run, Path | None]:
    """What to run and the results file: as said, or as an earlier run said."""
    from ..evaluation import read_results

    if resume is None:
        if run.model is None:
            raise click.UsageError("Missing option '--model'.", context)
        return run, out
    names = ("out", *(field.name for field in fields(Run)))
    default = click.core.ParameterSource.DEFAULT
    said = [name for name in names if context.get_parameter_source(name) != default]
    if said:
        flags = {param.name: param.opts[0] for param in context.command.params}
        raise ConfigError(
            f"--resume goes on with a run as it was, so {', '.join(flags[name] for name in said)} has no "
            "effect; drop it, or give all options again with --out instead of --resume"
        )
    return Run.kept(read_results(resume)), resume


def _prepared(run: Run, out: Path | None, diagnosis: bool) -> tuple[Any, Any, Any]:
    """Model and gates, what is compared, and the results so far; what cannot work is told here."""
    from ..evaluation import Grid, level, open_bench, open_results, parse_methods
    from ..evaluation.diagnostics import check_diagnosis
    from ..evaluation.tasks import digests

    data = tuple(map(Path, run.data))
    default = {"demo": "facts", "demo-vision": "albums"}.get(run.model or "", "needle-multikey")
    grid = Grid(
        run.tasks or (("text",) if data else (default,)),
        run.lengths or (1024,),
        run.budgets or ("1/4", "1/16", "1/64"),
        tuple(parse_methods(run.methods or METHODS)),
        run.samples,
        run.seed,
        run.chat,
        data,
    )
    if diagnosis:
        check_diagnosis(grid)
    assert run.model is not None
    bench = open_bench(
        *(run.model, grid.methods, run.gates, run.backend, run.chunk, run.buffer, run.batch),
        look=diagnosis,
        dtype=run.dtype,
    )
    grid = replace(grid, methods=level(grid.methods, [found.config for found in bench.gates.values()]))
    settings = bench.settings | {"samples": run.samples, "seed": run.seed, "chat": run.chat}
    settings["sinks"] = max(method.least_sinks for method in grid.methods)
    if data:
        settings["data"] = digests(data)
    results = open_results(out, settings, bench.digests)
    results.run = asdict(run)
    return bench, grid, results


def _carried_out(bench: Any, grid: Any, results: Any, progress: bool) -> None:
    from ..evaluation import run_grid

    try:
        run_grid(grid, bench.engines, bench.gates, results, bench.tokenizer, progress)
    except KeyboardInterrupt:
        kept = f"{len(results.cells)} cells are kept; go on with `mlx-kvret eval --resume {results.path}`"
        click.echo(kept if results.path else "stopped; with --out FILE what is done is kept", err=True)
        raise
