"""The torch backend on a GPU: decode attention against copy bandwidth, and whole steps against a full cache.

    python benchmarks/cuda_decode.py --write
    python benchmarks/cuda_decode.py --model smollm2 --budget 256 --context 8192 --batch 1

Random models of the shapes of Qwen3-4B and 8B in bfloat16, or a real one and its own gates; without a GPU the
same script runs tiny on the CPU, and the page says so. Kernels are timed by replay over more memory than the
L2 cache holds, captured steps are compared with captured ones and eager ones with eager ones, compilation is
not timed, and each row is written when it is measured. Full caches are the one of transformers as it is run,
its StaticCache captured, an ideal one (in place, without growth or mask) captured, and FlashInfer and
flash_attention_2 where they can be imported.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_cases import SIZES, build
from gpu_tables import Plan, bandwidth_rows, decode_rows, first_token_rows
from gpu_timing import GPU, device_line

import mlx_kvret
from mlx_kvret.cuda_backend import hooks

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "us": "µs", "gb_per_s": "GB/s", "of_copy": "of copy bandwidth", "time_over_balanced": "time / balanced",
    "rows": "batch", "ms": "ms a step", "tokens_per_s": "tokens/s", "s": "s", "times": "times",
    "cache_mb": "cache MB", "formula_mb": "formula MB", "peak_gb": "peak GB",
    "weights_gb": "weights GB", "cache_by_formula_gb": "cache GB by formula",
    "share": "share", "ms_without": "ms without", "error": "error",
}  # fmt: skip


class Page:
    """A page of tables that is written row by row."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._columns = path, list[str]()
        if path is not None:
            path.write_text("", encoding="utf-8")

    def line(self, text: str) -> None:
        print(text, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def table(self, title: str, columns: list[str]) -> None:
        """Begin a table of these figures, by their names in :data:`COLUMNS`."""
        self._columns = columns
        names = ["what", *(COLUMNS[name] for name in columns)]
        for text in ("", f"## {title}", "", f"| {' | '.join(names)} |", "|--" * len(names) + "|"):
            self.line(text)

    def row(self, what: str, **found: Any) -> None:
        """One row; figures that no column has are named in the first."""
        extra = [name for name in found if name not in self._columns]
        beside = [f"{name.replace('_', ' ')} {_cell(found[name])}" for name in extra]
        cells = [_cell(found.get(name, "")) for name in self._columns]
        self.line(f"| {', '.join([what, *beside])} | {' | '.join(cells)} |")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load(name: str, dtype: str) -> tuple[Any, hooks.Attachment]:
    """A model with the gates that are known for it."""
    model, _ = mlx_kvret.load(name, backend="cuda" if GPU else "torch", dtype=dtype)
    made = hooks.attachment(model)
    assert made is not None
    return model, made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, help="random models (4B 8B, tiny without a GPU)")
    parser.add_argument("--model", help="a folder, hub id or known name instead of random models")
    parser.add_argument("--dtype", help="of that model's weights and cache (as it is in its files)")
    parser.add_argument("--batch", nargs="+", type=int, help="rows of a step (1 4 16)")
    parser.add_argument("--context", nargs="+", type=int, help="tokens of the full cache (32768)")
    parser.add_argument("--budget", type=int, help="M, tokens per KV head (1024)")
    parser.add_argument("--chunk", type=int, help="tokens read at a time (2048)")
    parser.add_argument("--turns", type=int, help="turns of each cache, of which the median counts (5)")
    parser.add_argument("--tokens", type=int, help="tokens in a turn (32)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results")
    options = parser.parse_args()
    if (options.dtype and not options.model) or (options.size and options.model):
        parser.error("--dtype goes with --model, --size with random models; drop one")
    sizes = [options.model] if options.model else options.size or (["4B", "8B"] if GPU else ["tiny"])
    given = {
        name: getattr(options, name)
        for name in ("budget", "chunk", "turns", "tokens")
        if getattr(options, name) is not None
    }
    if options.batch:
        given["batches"] = tuple(options.batch)
    name = f"cuda_decode_{Path(options.model).name}.md" if options.model else "cuda_decode.md"
    page = Page(RESULTS / name if options.write else None)
    page.line("# The torch backend\n")
    page.line(
        f"`python benchmarks/cuda_decode.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, "
        f"{device_line()}, {torch.get_num_threads()} threads."
    )
    endless = lambda: 1e9  # noqa: E731
    if not options.model:
        page.table("Decode attention of one layer", ["us", "gb_per_s", "of_copy", "time_over_balanced"])
        bandwidth_rows(page.row, endless)
    for size in sizes:
        made = load(size, options.dtype or "auto") if options.model else build(size)
        plan = Plan.of(size, **given)
        contexts = options.context or [plan.context]
        for context in contexts:
            plan.context = context
            page.table(
                f"Whole steps, {size}: M = {plan.budget}, full cache of {context:,} tokens",
                ["rows", "ms", "tokens_per_s", "cache_mb", "formula_mb", "peak_gb", "times"],
            )
            decode_rows(page.row, endless, plan, made)
        plan.contexts = tuple(options.context or plan.contexts)
        page.table(
            f"First token, {size}", ["s", "tokens_per_s", "peak_gb", "weights_gb", "cache_by_formula_gb"]
        )
        first_token_rows(page.row, endless, plan, made)


if __name__ == "__main__":
    main()
