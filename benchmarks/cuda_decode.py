"""The torch backend on a GPU: decode attention against copy bandwidth, and whole steps against a full one.

``python benchmarks/cuda_decode.py --write``, or with ``--model smollm2 --budget 256 --context 8192 --batch 1
--chunk 1024 --tokens 32`` a real model and its own gates. The models are otherwise random Qwen3, on a GPU of
the shapes of 4B and 8B in bfloat16; without one the same script runs tiny on the CPU, and the table says so.
The full cache runs torch's SDPA and, where they are installed, ``flash_attention_2`` and FlashInfer;
``sliding`` are transformers' sliding-window layers of M tokens. Caches take turns and ratios are medians over
the turns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import mlx_kvret
from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.cuda_backend.gates import RetentionGates
from mlx_kvret.cuda_backend.kernels.dispatch import attend
from mlx_kvret.cuda_backend.pool import Pool, listing
from mlx_kvret.cuda_backend.step import decoder_step
from mlx_kvret.cuda_backend.view import LayerView

Step = Callable[[torch.Tensor], torch.Tensor]
RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
QWEN3 = {
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936,
}  # fmt: skip
SIZES = {
    "4B": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728},
    "8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1000},
}  # fmt: skip
PEERS = {"flash_attention_2": "flash_attn", "FlashInfer": "flashinfer"}


def flashinfer_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """FlashInfer's decoding, a sequence at a time; torch's SDPA for prompts."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    from flashinfer import single_decode_with_kv_cache

    scale = options.get("scaling")
    rows = [
        single_decode_with_kv_cache(q[:, 0], k, v, kv_layout="HND", sm_scale=scale)
        for q, k, v in zip(query, key, value, strict=True)
    ]
    return torch.stack(rows)[:, None], None


AttentionInterface.register("FlashInfer", flashinfer_attention)
AttentionMaskInterface.register("FlashInfer", sdpa_mask)


def seconds(work: Callable[[], Any], repeat: int = 20) -> float:
    """Median time of one call, the device's own work included."""
    times = []
    for turn in range(repeat + 3):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes per second read and written by a device copy of 1 GB (64 MB on a CPU)."""
    source = torch.empty(1 << (30 if GPU else 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def ragged_view(lengths: list[int], dim: int) -> LayerView:
    """A layer whose heads hold that many entries, scattered over the pool, and one new token."""
    heads = len(lengths)
    pool = Pool(1, 1, heads, DEVICE)
    keys = torch.randn(1, heads, 1, dim, device=DEVICE, dtype=DTYPE)
    pool.grow(-(-sum(lengths) // heads), keys, keys)
    owner = torch.arange(heads).repeat_interleave(torch.tensor(lengths))[torch.randperm(sum(lengths))]
    slab = pool.slab(0)
    slab.owner[: len(owner)] = owner.to(DEVICE, torch.int32)
    pool.keys.normal_()
    pool.values.normal_()
    table, offsets = listing(slab.owner, heads, len(slab.table))
    slab.take({"table": table, "offsets": offsets})
    return LayerView(pool, 0, 0, keys, keys)


def attention_table(kept: list[int], heads: int, group: int, dim: int) -> list[str]:
    """Balanced and 20:1 heads at the same number of entries."""
    limit = copy_bandwidth()
    rows = ["| kept per head | heads | GB/s | of copy bandwidth | time / balanced |", "|--|--|--|--|--|"]
    queries = torch.randn(1, heads * group, 1, dim, device=DEVICE, dtype=DTYPE)
    for count in kept:
        small = max(1, count * heads // (heads - 1 + 20))
        shapes = {
            "balanced": [count] * heads,
            "20:1": [count * heads - small * (heads - 1)] + [small] * (heads - 1),
        }
        times = {}
        for name, lengths in shapes.items():
            view = ragged_view(lengths, dim)
            times[name] = seconds(lambda view=view: attend(queries, view, dim**-0.5))
            speed = 2 * count * heads * dim * queries.element_size() / times[name]
            rows.append(
                f"| {count:,} | {name} | {speed / 1e9:.1f} | {speed / limit:.0%} | "
                f"{times[name] / times['balanced']:.2f} |"
            )
    return [f"Copy bandwidth {limit / 1e9:.0f} GB/s.", "", *rows]


def build(size: str, context: int) -> tuple[Any, hooks.Attachment]:
    """A random model with random gates whose log β spreads from head to head."""
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES[size], max_position_embeddings=2 * context, dtype=DTYPE)
    with torch.device(DEVICE):
        model: Any = Qwen3ForCausalLM._from_config(config, dtype=DTYPE).eval().requires_grad_(False)
        shape = GateConfig("rg10", config.num_hidden_layers, config.num_key_value_heads, config.hidden_size)
        gates = RetentionGates(shape).requires_grad_(False).to(DTYPE)
        gates.shared.bias.data = torch.linspace(4.0, 8.0, config.num_key_value_heads)
    return model, hooks.install(model, gates, {"model": "", "gates": ""})


def load(name: str, dtype: str) -> tuple[Any, hooks.Attachment]:
    """A model with the gates that are known for it."""
    model, _ = mlx_kvret.load(name, backend="cuda" if GPU else "torch", dtype=dtype)
    made = hooks.attachment(model)
    assert made is not None
    return model, made


@torch.no_grad()
def read(model: Any, cache: Any, rows: int, tokens: int, chunk: int) -> float:
    """Prefill random tokens; seconds until the next token is known."""
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), device=DEVICE)
    synchronize()
    start = time.perf_counter()
    for part in ids.split(chunk, 1):
        logits = model(part, **cache_argument(model, cache), logits_to_keep=1).logits
    logits.argmax(-1)
    synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def turn(step: Step, rows: int, tokens: int) -> float:
    """Seconds per token of a turn of greedy decoding."""
    token = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        token = step(token).argmax(-1, keepdim=True)
    synchronize()
    return (time.perf_counter() - start) / tokens


def stepper(model: Any, cache: Any) -> Step:
    """From tokens (R, 1) to logits (R, V): what generation runs, captured on a GPU; or a plain pass."""
    if isinstance(cache, BoundedCache):
        step = decoder_step(model, cache)
        return lambda tokens: step(tokens, torch.clone)
    return partial(plain_step, model, cache)


def plain_step(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(tokens, **cache_argument(model, cache)).logits[:, -1]
    return logits


def step_table(
    size: str, batches: list[int], context: int, budget: int, options: argparse.Namespace
) -> list[str]:
    """Tokens per second of every sequence of a batch together, bounded and full."""
    model, made = load(size, options.dtype or "auto") if options.model else build(size, context)
    config, layers = EvictionConfig.create(budget), model.config.num_hidden_layers
    stock = ["sdpa", *(name for name, package in PEERS.items() if GPU and importlib.util.find_spec(package))]
    rows = [
        "| model | batch | cache | first token s | tokens/s | full = 1 | cache MB | formula MB | peak GB |"
    ]
    rows.append("|--" * 9 + "|")
    for batch in batches:
        caches: dict[str, Any] = {"bounded": hooks.new_cache(model, made, config)}
        caches |= {f"full {name}": DynamicCache(config=model.config) for name in stock}
        caches["sliding sdpa"] = Cache(layers=[DynamicSlidingWindowLayer(budget) for _ in range(layers)])
        first: dict[str, float] = {}
        peak: dict[str, float] = {}
        for name in list(caches):
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            try:
                with implementation(model, name):
                    first[name] = read(model, caches[name], batch, context, options.chunk)
            except torch.OutOfMemoryError:
                del caches[name]
                rows.append(f"| {size} | {batch} | {name} | out of memory |" + " |" * 5)
            peak[name] = torch.cuda.max_memory_allocated() / 1e9 if GPU else 0.0
        turns: dict[str, list[float]] = {name: [] for name in caches}
        steps = {name: stepper(model, cache) for name, cache in caches.items()}
        for number in range(options.turns + 1):
            for name, step in steps.items():
                with implementation(model, name):
                    spent = turn(step, batch, options.tokens)
                turns[name] += [spent] if number else []  # the first warms up
        for name, cache in caches.items():
            shape, own = made.layout.shape, turns[name]
            full = turns.get("full sdpa", [float("nan")] * len(own))
            ratio = statistics.median(f / t for f, t in zip(full, own, strict=True))
            bounded = isinstance(cache, BoundedCache)
            held = cache.nbytes if bounded else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
            formula = shape.nbytes(config.budget, config.buffer) * batch if bounded else held
            rows.append(
                f"| {size} | {batch} | {name} | {first[name]:.2f} | {batch / statistics.median(own):.1f} | "
                f"{ratio:.2f} | {held / 1e6:.1f} | {formula / 1e6:.1f} | {peak[name]:.1f} |"
            )
    return [*rows, "", overhead(model, made, config, context, options)]


class implementation:
    """The model with the attention a contestant is named after; ours reads every kind of cache."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name.split()[-1]

    def __enter__(self) -> None:
        self.stock = self.model.config._attn_implementation
        if self.name != "bounded":
            self.model.set_attn_implementation(self.name)

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self.stock)


def overhead(model: Any, made: hooks.Attachment, config: EvictionConfig, context: int, options: Any) -> str:
    """What compactions and gates take of decoding: with and without, in turns of one buffer of tokens.

    Without a captured step, in which the gates could not be left out.
    """
    steps: dict[str, Step] = {}
    for name in ("with", "without"):
        cache = hooks.new_cache(model, made, config)
        read(model, cache, 1, context, options.chunk)
        assert cache.shared is not None
        cache.shared.settle()
        if name == "without":
            # nothing is due, and no gate has anything to read
            (row,) = cache.shared.rows
            row.schedule.config = endless = EvictionConfig.create(config.budget, 10**6)
            row.schedule.counts = row.schedule.counts
            cache.shared.arena.raise_to(endless)
            cache.shared.arena.gates = None
        steps[name] = partial(plain_step, model, cache)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.turns + 1):
        for name, step in steps.items():
            spent = turn(step, 1, config.buffer)
            times[name] += [spent] if number else []
    shares = [1 - less / more for more, less in zip(times["with"], times["without"], strict=True)]
    return f"Compactions and gates take {statistics.median(shares):.1%} of decoding at batch 1."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, help="random models (4B 8B, tiny without a GPU)")
    parser.add_argument("--model", help="a folder, hub id or known name instead of random models")
    parser.add_argument("--dtype", help="of that model's weights and cache (as it is in its files)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16] if GPU else [1, 4])
    parser.add_argument("--context", nargs="+", type=int, default=[32768] if GPU else [512])
    parser.add_argument("--budget", type=int, default=1024 if GPU else 32, help="M, tokens per KV head")
    parser.add_argument("--chunk", type=int, default=2048 if GPU else 128, help="tokens read at a time")
    parser.add_argument("--turns", type=int, default=7, help="turns of each cache")
    parser.add_argument("--tokens", type=int, default=32 if GPU else 8, help="tokens in a turn")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results")
    options = parser.parse_args()
    if (options.dtype and not options.model) or (options.size and options.model):
        parser.error("--dtype goes with --model, --size with random models; drop one")
    options.size = options.size or ([options.model] if options.model else ["4B", "8B"] if GPU else ["tiny"])
    shapes = "" if options.model else "tiny shapes on "
    device = torch.cuda.get_device_name() if GPU else f"no GPU: {shapes}the CPU ({platform.machine()})"
    dtype = options.dtype or ("its own type" if options.model else DTYPE)
    lines = [
        "# The torch backend",
        "",
        f"`python benchmarks/cuda_decode.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {device}, "
        f"torch {torch.__version__}, {dtype}, {torch.get_num_threads()} threads, M = {options.budget}, "
        f"chunks of {options.chunk}, medians of {options.turns} turns of {options.tokens} tokens.",
    ]
    if not options.model:
        lines += ["", "## Decode attention of one layer", ""]
        lines += attention_table([8192, 32768] if GPU else [256, 1024], 8, 4, 128 if GPU else 32)
    for context in options.context:
        for size in options.size:
            lines += ["", f"## Whole steps after {context:,} tokens", ""]
            lines += step_table(size, options.batch, context, options.budget, options)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        name = f"cuda_decode_{Path(options.model).name}.md" if options.model else "cuda_decode.md"
        (RESULTS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
