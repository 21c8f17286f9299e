"""Decode speed, time to first token and KV memory of three caches, side by side in one run.

``python benchmarks/mlx_decode.py --write`` (on Linux put OpenBLAS in front of MLX, as ``make bench``
does), or with ``--model smollm2 --budget 256 --length 8192 --tokens 32`` a real model and its own gates.

The models are otherwise random Qwen3 in float32. ``full`` is mlx-lm's KVCache, ``rotating`` its
RotatingKVCache of the same number of tokens, ``bounded`` ours, with random gates, so that heads are uneven
and every entry competes. The caches take turns for a few tokens at a time, and the ratios are medians over
these turns: a machine that slows down slows all of them down.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.qwen3 import Model, ModelArgs

import mlx_kvret
from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.mlx_backend import hooks
from mlx_kvret.mlx_backend.gates import RetentionGates

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "10M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192},
    "100M": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000},
}  # fmt: skip
LENGTHS = {"10M": (2048, 8192, 32768), "100M": (2048, 8192)}


@dataclass
class Contestant:
    """A cache, how long reading took, and seconds per token of each turn."""

    cache: list[Any]
    first_token: float = 0.0
    turns: list[float] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.cache)


def build(size: str) -> tuple[nn.Module, hooks.Attachment]:
    """A random model with random gates whose log β spreads from head to head."""
    mx.random.seed(0)
    more = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
    args = ModelArgs.from_dict({**SIZES[size], **more, "max_position_embeddings": 40960})
    model = Model(args)
    gates = RetentionGates(
        GateConfig("rg10", args.num_hidden_layers, args.num_key_value_heads, args.hidden_size, width=256)
    )
    gates.shared.bias = mx.linspace(4.0, 8.0, args.num_key_value_heads)
    mx.eval(model.parameters(), gates.parameters())
    return model, hooks.install(model, gates, {"model": "", "gates": ""})


def load(name: str) -> tuple[nn.Module, hooks.Attachment]:
    """A model with the gates that are known for it."""
    model, _ = mlx_kvret.load(name, backend="mlx")
    attached = hooks.attachment(model)
    assert attached is not None
    return model, attached


def read(model: nn.Module, entrant: Contestant, tokens: mx.array, chunk: int) -> mx.array:
    """Prefill in chunks; returns the next token (1, 1)."""
    start = time.perf_counter()
    for at in range(0, tokens.shape[1], chunk):
        logits = model(tokens[:, at : at + chunk], cache=entrant.cache)
        mx.eval([entry.state for entry in entrant.cache])
    token = logits[:, -1:].argmax(-1)
    mx.eval(token)
    entrant.first_token = time.perf_counter() - start
    return token


def decode(model: nn.Module, entrant: Contestant, token: mx.array, count: int) -> mx.array:
    """One turn of ``count`` greedy tokens, as mlx-lm's loop runs them: one step ahead of the host."""
    start = time.perf_counter()
    # on that loop's stream a bounded cache, too, leaves a token in flight
    with mx.stream(generation_stream):
        for _ in range(count):
            token = model(token, cache=entrant.cache)[:, -1:].argmax(-1)
            mx.async_eval(token)
        mx.eval(token)
    entrant.turns.append((time.perf_counter() - start) / count)
    return token


def measure(size: str, length: int, options: argparse.Namespace) -> str:
    """One table row per cache."""
    model, attached = build(size) if size in SIZES else load(size)
    layers, vocabulary = len(model.layers), model.args.vocab_size
    config = EvictionConfig.create(options.budget)
    entrants = {
        "full": Contestant([KVCache() for _ in range(layers)]),
        "rotating": Contestant([RotatingKVCache(options.budget, keep=4) for _ in range(layers)]),
        "bounded": Contestant(hooks.new_cache(model, attached, config)),
    }
    rng = np.random.default_rng(0)
    tokens = mx.array(rng.integers(0, vocabulary, (1, length)))
    last = {name: read(model, entrant, tokens, options.chunk) for name, entrant in entrants.items()}
    for turn in range(options.turns + 1):
        for name, entrant in entrants.items():
            last[name] = decode(model, entrant, last[name], options.tokens)
            if turn == 0:  # warm-up
                entrant.turns.clear()
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    full = entrants["full"]
    rows = []
    for name, entrant in entrants.items():
        ratio = statistics.median(f / t for f, t in zip(full.turns, entrant.turns, strict=True))
        rows.append(
            f"| {parameters / 1e6:.0f}M | {length:,} | {name} | {entrant.first_token:.1f} | "
            f"{full.first_token / entrant.first_token:.2f} | {1 / statistics.median(entrant.turns):.1f} | "
            f"{ratio:.2f} | {entrant.nbytes / 1e6:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--model", help="a folder, hub id or known name instead of random models")
    parser.add_argument("--length", nargs="+", type=int, help="context lengths instead of each size's own")
    parser.add_argument("--budget", type=int, default=512, help="tokens per KV head (512)")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens read at a time (1024)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each cache (7)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens in a turn (16)")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args()
    device = mx.device_info().get("device_name", "") if mx.metal.is_available() else cpu_name()
    lines = [
        "# Decoding with three caches",
        "",
        f"`python benchmarks/mlx_decode.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {device}, MLX "
        f"{mx.__version__}, M = {options.budget}, chunks of {options.chunk}, medians of "
        f"{options.turns} turns of {options.tokens} tokens.",
        "",
        "| parameters | context | cache | first token, s | faster | decode, tokens/s | faster | KV, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for size in [options.model] if options.model else options.size:
        for length in options.length or LENGTHS.get(size, (2048, 8192)):
            lines.append(measure(size, length, options))
            print(lines[-1], flush=True)
    if options.write:
        name = f"mlx_decode_{Path(options.model).name}.md" if options.model else "mlx_decode.md"
        (RESULTS / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """The processor's name, or what Python knows of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1] for line in lines if "model name" in line]
    return f"{len(names)} x {names[0].strip()}" if names else platform.processor()


if __name__ == "__main__":
    main()
