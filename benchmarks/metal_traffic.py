"""What the Metal kernels move, counted access by access by the emulator, for the shapes of real models.

``python benchmarks/metal_traffic.py --write`` needs no Metal, but clang 19 (see ``tests/metal_host``).
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kernels import traffic  # noqa: E402

from mlx_kvret.core.budget import CacheShape  # noqa: E402
from mlx_kvret.core.config import GateConfig  # noqa: E402
from mlx_kvret.mlx_backend.kernels.decode_attention import pieces  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "metal_traffic.md"
BITS = 4.5  # per weight: 4 bits, and a scale and a bias for each 64 weights
GATE_WIDTH = 512
SIZES = (128, 256, 512, 1024, 2048, 4096)
HALF = 2


@dataclass(frozen=True)
class Shape:
    """A model as far as the cache sees it; only layers whose cache is bounded count."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    weights: float

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def cache(self) -> CacheShape:
        return CacheShape(self.layers, self.kv_heads, self.head_dim, self.head_dim, HALF, self.hidden)


MODELS = {
    "Qwen3-0.6B": Shape(28, 16, 8, 128, 1024, 0.60e9),
    "Qwen3-1.7B": Shape(28, 16, 8, 128, 2048, 1.72e9),
    "Qwen3-4B": Shape(36, 32, 8, 128, 2560, 4.02e9),
    "Qwen3-8B": Shape(36, 32, 8, 128, 4096, 8.19e9),
    "Llama-3.2-3B": Shape(28, 24, 8, 128, 3072, 3.21e9),
    "gemma-3-4b": Shape(5, 8, 4, 256, 2560, 3.88e9),  # the other 29 layers have windows
}


def uneven(heads: int, budget: int) -> list[int]:
    """Lengths of ``heads`` heads with the mean ``budget``, the first a hundred times the others."""
    short = heads * budget // (99 + heads)
    return [heads * budget - short * (heads - 1), *[short] * (heads - 1)]


def decoding(budget: int) -> Iterator[str]:
    """One layer, one token, a half-full buffer."""
    yield "| model | heads | threadgroups | K and V | all loaded | stored | work | memory |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, model in MODELS.items():
        cases = {"even": [budget] * model.kv_heads, "100:1": uneven(model.kv_heads, budget)}
        for case, lengths in cases.items():
            seen = traffic.decode(lengths, budget // 16, model.group, model.head_dim)
            yield (
                f"| {name} | {case} | {seen.threadgroups} | {seen.entries:.3f} | {seen.loaded:.3f} | "
                f"{seen.stored:.3f} | {seen.spread:.1%} | {seen.memory:,} |"
            )


def few_bits(budget: int) -> Iterator[str]:
    """One layer, one token, heads 100:1: relative to the entries as they are stored."""
    yield "| model | bits | bytes of an entry | K and V | all loaded | stored | memory |"
    yield "|---|---|---|---|---|---|---|"
    for name, model in MODELS.items():
        for bits in (None, 8, "k8v4", 4):
            lengths = uneven(model.kv_heads, budget)
            seen = traffic.decode(lengths, budget // 16, model.group, model.head_dim, bits=bits)
            yield (
                f"| {name} | {bits or 16} | {model.cache.kept_bytes(bits)} | {seen.entries:.3f} | "
                f"{seen.loaded:.3f} | {seen.stored:.3f} | {seen.memory:,} |"
            )


def batch(budget: int) -> Iterator[str]:
    """One layer of Qwen3-4B, one token of each row, heads 100:1 in every other row."""
    yield "| rows | bits | threadgroups | K and V | all loaded | stored |"
    yield "|---|---|---|---|---|---|"
    model = MODELS["Qwen3-4B"]
    for rows in (1, 2, 4, 8, 16):
        for bits in (None, 8, "k8v4", 4):
            kinds = uneven(model.kv_heads, budget // 4), [budget // 4] * model.kv_heads
            lengths, recent = [kinds[row % 2] for row in range(rows)], [1 + row * 3 for row in range(rows)]
            seen = traffic.rows(lengths, recent, model.group, model.head_dim, bits=bits)
            yield (
                f"| {rows} | {bits or 16} | {seen.threadgroups} | {seen.entries:.3f} | {seen.loaded:.3f} | "
                f"{seen.stored:.3f} |"
            )


def chunks(budget: int) -> Iterator[str]:
    """One layer of Qwen3-4B, 16 or fewer tokens of each row in one launch, heads 100:1 in every other row."""
    yield "| rows | bits | K and V | memory |"
    yield "|---|---|---|---|"
    model = MODELS["Qwen3-4B"]
    for rows in (1, 2, 4, 8, 16):
        for bits in (None, 8, "k8v4", 4):
            kinds = uneven(model.kv_heads, budget // 8), [budget // 8] * model.kv_heads
            tokens = [1 + row * 5 % 16 for row in range(rows)]
            lengths = [kinds[row % 2] for row in range(rows)]
            seen, blocks = traffic.chunks(lengths, tokens, model.group, model.head_dim, bits=bits)
            assert set(blocks) == {1}
            yield f"| {rows} | {bits or 16} | {seen.entries:.3f} | {seen.memory:,} |"


def together(budget: int) -> Iterator[str]:
    """Launches of a compaction of rows that are due at once, 36 layers of 8 heads: of this library's kernels,
    and of these and MLX's operations together, without the copies that make an array contiguous.
    """
    yield "| rows | kernels, row after row | at once | all, row after row | at once |"
    yield "|---|---|---|---|---|"
    for rows in (1, 2, 4, 8, 16):
        apart, most = traffic.launches(rows, 36, 8, together=False)
        ours, every = traffic.launches(rows, 36, 8)
        yield f"| {rows} | {apart} | {ours} | {most:,} | {every} |"


def compacting_rows(budget: int) -> Iterator[str]:
    """Qwen3-4B's heads with a 32nd of the budget; bytes of each candidate."""
    yield "| rows | score reads | loaded, bytes each | stored | moves / evicted | kernels |"
    yield "|---|---|---|---|---|---|"
    heads, each = MODELS["Qwen3-4B"].cache.heads, budget // 32
    for rows in (1, 4, 16):
        seen = traffic.compaction(each * heads, each // 8 * heads, heads, rows=rows)
        yield (
            f"| {rows} | {seen.score_reads:.2f} | {seen.loaded:.1f} | {seen.stored:.1f} | {seen.moves:.3f} | "
            f"{seen.launches} |"
        )


def threadgroups(budget: int) -> Iterator[str]:
    """Of one launch of decode attention, for one row and for 8; a buffer of M/8."""
    yield "| model | bits | " + " | ".join(f"M = {most:,}" for most in SIZES) + " |"
    yield "|---|---|" + "---|" * len(SIZES)
    for name, model in MODELS.items():
        for bits in (None, "k8v4"):
            shape, cells = model.cache, []
            for most in SIZES:
                kept, newest = most * shape.kept_bytes(bits), most // 8 * shape.entry_bytes
                one, eight = (pieces((kept + newest) * shape.kv_heads, rows) * rows for rows in (1, 8))
                cells.append(f"{one}, {eight}")
            yield f"| {name} | {bits or 16} | " + " | ".join(cells) + " |"


def reading(budget: int) -> Iterator[str]:
    """One layer, a chunk as long as an eighth of the budget, by the kernel."""
    yield "| model | tokens | blocks of rows | K and V | memory |"
    yield "|---|---|---|---|---|"
    for name, model in MODELS.items():
        tokens = max(9, budget // 8)
        lengths = uneven(model.kv_heads, budget // 8)
        seen, blocks = traffic.prefill(lengths, tokens, model.group, model.head_dim)
        yield f"| {name} | {tokens} | {blocks} | {seen.entries:.2f} | {seen.memory:,} |"


def compacting(budget: int) -> Iterator[str]:
    """All heads compete: what there is to choose from, what stays, and where newcomers go."""
    yield "| model | candidates | score reads | loaded, bytes each | stored | moves / evicted | memory |"
    yield "|---|---|---|---|---|---|---|"
    for name, model in MODELS.items():
        heads = model.cache.heads
        seen = traffic.compaction(budget * heads, budget // 8 * heads, heads)
        yield (
            f"| {name} | {(budget + budget // 8) * heads:,} | {seen.score_reads:.2f} | {seen.loaded:.1f} | "
            f"{seen.stored:.1f} | {seen.moves:.3f} | {seen.memory:,} |"
        )


def gates(budget: int) -> Iterator[str]:
    """Arithmetic from the library's own figures: gates in bfloat16, weights in 4 bits."""
    yield "| model | gates, MB | once per | a token, MB | of the weights | cache bound, MB | of K and V |"
    yield "|---|---|---|---|---|---|---|"
    for name, model in MODELS.items():
        config = GateConfig("rg10", model.layers, model.kv_heads, model.hidden, GATE_WIDTH)
        size = sum(HALF * _product(shape) for shape in config.tensor_shapes().values())
        buffer, shape = budget // 8, model.cache
        tokens = shape.deferred(budget, buffer)
        bound = shape.nbytes(budget, buffer)
        entries = (budget + buffer) * shape.heads * shape.entry_bytes
        yield (
            f"| {name} | {size / 1e6:.1f} | {tokens} tokens | {size / tokens / 1e6:.2f} | "
            f"{size / tokens / (model.weights * BITS / 8):.2%} | {bound / 1e6:.1f} | {bound / entries:.3f} |"
        )


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def report(budget: int) -> Iterator[str]:
    yield "# Traffic of the Metal kernels"
    yield ""
    yield f"`python benchmarks/metal_traffic.py --write`, M = {budget}, half precision, counted by emulation."
    yield "Bytes are relative to the keys and values of the layer's entries; 1.0 is one read of each."
    for title, table in {
        "Decoding a token": decoding,
        "Few bits": few_bits,
        "Rows of a batch": batch,
        "Threadgroups": threadgroups,
        "Reading a chunk": reading,
        "Chunks of a batch": chunks,
        "A compaction": compacting,
        "A compaction of several rows": compacting_rows,
        "Launches of a compaction": together,
        "Gates": gates,
    }.items():
        yield f"\n## {title}\n\n{inspect.getdoc(table)}\n"
        yield from table(budget)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=int, default=1024, help="M, kept tokens per KV head (1024)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results")
    options = parser.parse_args()
    lines = []
    for line in report(options.budget):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
