"""What several processes keep, say and save, against one process: 500 tokens, all scopes and policies.

A small model of random weights reads 500 tokens in chunks and one by one; after every third pass what is
kept of every head is compared with that of one process, position for position, and the logits are. Then
answers, batches with budgets of their own, and caches that some save and others open. Processes run on
this machine, as mlx.launch (ring) and torchrun (gloo) start them. Nothing is timed. Writes
benchmarks/results/ranks_equality.md.

python benchmarks/ranks_equality.py            two processes, and three for some of the cases; minutes
python benchmarks/ranks_equality.py --quick    two processes, a few cases, no file
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlx_kvret
from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.tensors import Tensor

RESULTS = Path(__file__).parent / "results" / "ranks_equality.md"
LAYERS, HEADS, HIDDEN, WORDS, TOKENS = 3, 6, 192, 640, 500
SIZES = {"budget": 24, "buffer": 6}
CASES: dict[str, dict[str, Any]] = {
    "global": {},
    "layer": {"scope": "layer"},
    "head": {"scope": "head"},
    "modality": {"scope": "modality", "picture_share": 0.25},
    "sinks, window, least per head, lookahead": {"sinks": 3, "window": 5, "min_per_head": 4, "lookahead": 4},
    "threshold": {"threshold": 1e-3},
    "threshold, head": {"threshold": 1e-3, "scope": "head"},
    "ties: gates alike, global": {"ties": True},
    "ties: gates alike, layer": {"ties": True, "scope": "layer"},
    "ties: recent, global": {"policy": "recent", "scope": "global", "sinks": 2, "window": 4},
    "random": {"policy": "random", "scope": "global", "policy_seed": 5},
    "knorm": {"policy": "knorm", "scope": "global"},
    "keydiff": {"policy": "keydiff", "scope": "layer"},
    "8 bits": {"kv_bits": 8},
    "k8v4, layer": {"kv_bits": "k8v4", "scope": "layer"},
    "full": {"policy": "full"},
}
QUICK = ["global", "ties: gates alike, global", "modality", "8 bits", "threshold, head", "keydiff"]
# a prompt in chunks, then answers and turns; no token comes twice, for its keys in the first layer would be
# equally long but for rounding
CHUNKS = [150, 70, *[1] * 20, 40, *[1] * 12, 3, 90, *[1] * 10, 90, *[1] * 15]
# after so many passes one looks at what is kept
LOOKS = 3
TEXT = [int(token) for token in np.random.default_rng(3).permutation(WORDS - 3)[:TOKENS] + 2]


@dataclass(frozen=True)
class Run:
    """Several processes of a backend that split the model in one way."""

    backend: str
    split: str
    size: int

    def told(self, folder: Path) -> list[dict[str, str]]:
        """What mlx.launch (ring) or torchrun tells each process in its environment."""
        with contextlib.ExitStack() as stack:
            free = [stack.enter_context(socket.socket()) for _ in range(self.size)]
            for one in free:
                one.bind(("127.0.0.1", 0))
            ports = [one.getsockname()[1] for one in free]
        if self.backend == "mlx":
            hosts = folder / "hosts.json"
            hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
            return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(self.size)]
        alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]), "WORLD_SIZE": str(self.size)}
        return [alike | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.size)]


def make(folder: Path) -> None:
    """A model both backends load, gates of random weights, and gates that are alike in all heads."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=32, max_position_embeddings=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name and "lm_head" not in name:
            weight.mul_(4)
    model.save_pretrained(folder / "model")
    stored = json.loads((folder / "model" / "config.json").read_text())
    gates = GateConfig(
        "rg10", LAYERS, HEADS, HIDDEN, width=16, base_model="qwen2", base_fingerprint=fingerprint(stored)
    )
    random = np.random.default_rng(1)
    spread = {
        name: Tensor.of((random.normal(size=shape) / shape[-1] ** 0.5 * 3).astype(np.float32))
        for name, shape in gates.tensor_shapes().items()
    }
    alike = {name: Tensor.of(np.zeros(shape, np.float32)) for name, shape in gates.tensor_shapes().items()}
    save_gates(folder / "gates", gates, spread)
    save_gates(folder / "alike", gates, alike)


def work(folder: Path, backend: str, split: str | None, names: list[str]) -> dict[str, Any]:
    """All of it, by one process or by each of several."""
    how = {} if split is None else {"parallel": split}
    found: dict[str, Any] = {}
    for gates in ("alike", "gates"):
        model, _ = mlx_kvret.load(folder / "model", folder / gates, backend=backend, **how)
        for name in names:
            options = dict(CASES[name])
            if options.pop("ties", False) == (gates == "alike"):
                found[name] = reading(model, options)
    found["answers"] = dict(answers(model))
    found["saved"] = dict(saved(model, folder, "alone" if split is None else "together"))
    return found


def reading(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    cache = mlx_kvret.make_cache(model, **SIZES | options)
    logits, marks, start, most, fell = [], [], 0, 0, 0
    for size in CHUNKS:
        logits.append(forward(model, TEXT[start : start + size], cache))
        start += size
        if len(logits) % LOOKS == 0:
            kept = [row for layer in cache.kept_positions() for row in layer]
            marks.append([zlib.crc32(row.astype(np.int32).tobytes()) for row in kept])
        before, most = most, cache.entries
        fell += most < before + size * LAYERS * HEADS
    return {"logits": np.array(logits), "kept": marks, "compactions": fell, "bytes": cache.nbytes}


def forward(model: Any, ids: list[int], cache: Any) -> np.ndarray:
    """The logits of the last token."""
    if "torch" in {cls.__module__.partition(".")[0] for cls in type(model).__mro__}:
        import torch

        from mlx_kvret.cuda_backend.cache import cache_argument

        with torch.no_grad():
            return model(torch.tensor([ids]), **cache_argument(model, cache)).logits[0, -1].numpy()
    import mlx.core as mx

    return np.array(model(mx.array([ids]), cache=cache)[0, -1])


def answers(model: Any) -> Iterator[tuple[str, Any]]:
    yield "one", mlx_kvret.generate(model, None, TEXT[:400], max_tokens=60, **SIZES)
    yield "drawn", mlx_kvret.generate(model, None, TEXT[:400], max_tokens=60, temp=0.8, seed=3, **SIZES)
    prompts = [TEXT[:300], TEXT[100:130], TEXT[50:450], TEXT[:1]]
    options = {"max_tokens": 30, "budget": [24, 12, 36, 24], "buffer": 6}
    yield "batch", mlx_kvret.generate_batch(model, None, prompts, **options)
    yield "drawn batch", mlx_kvret.generate_batch(model, None, prompts, temp=0.8, seed=7, **options)
    yield "batch, few bits", mlx_kvret.generate_batch(model, None, prompts, kv_bits=8, **options)


def saved(model: Any, folder: Path, who: str) -> Iterator[tuple[str, Any]]:
    """Save, and open what the others have saved: each goes on as the other does."""
    for name, options in (("floats", {}), ("bits", {"kv_bits": "k8v4"})):
        cache = mlx_kvret.make_cache(model, **SIZES | options)
        mlx_kvret.generate(model, None, TEXT[:400], cache=cache, max_tokens=20)
        mlx_kvret.save_cache(model, cache, folder / f"{who}-{name}.kv")
        for other in ("alone", "together"):
            if (path := folder / f"{other}-{name}.kv").exists():
                opened, _ = mlx_kvret.load_cache(model, path)
                kept = [row.tolist() for layer in opened.kept_positions() for row in layer]
                text = mlx_kvret.generate(model, None, TEXT[400:430], cache=opened, max_tokens=40)
                yield f"{other}-{name}", (kept, text)


def started(folder: Path, run: Run, names: list[str]) -> list[dict[str, Any]]:
    """What each process of a run found."""
    told = ["--work", str(folder), run.backend, run.split, *names]
    command = [sys.executable, __file__, *told]
    processes = [subprocess.Popen(command, env=os.environ | own) for own in run.told(folder)]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError(f"{run} failed")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(run.size)]


def rows(alone: dict[str, Any], found: list[dict[str, Any]], names: list[str]) -> Iterator[tuple[str, ...]]:
    """A row for each case: what is equal on all ranks, out of how much."""
    for name in names:
        expected = alone[name]
        equal = min(
            sum(a == b for mine, theirs in zip(one[name]["kept"], expected["kept"], strict=True)
                for a, b in zip(mine, theirs, strict=True))
            for one in found
        )  # fmt: skip
        off = max(float(np.abs(one[name]["logits"] - expected["logits"]).max()) for one in found)
        looked = f"{equal:,} of {len(alone[name]['kept']) * LAYERS * HEADS:,}"
        yield name, str(expected["compactions"]), looked, f"{off:.1e}"
    for name, text in alone["answers"].items():
        equal = sum(one["answers"][name] == text for one in found)
        yield f"answer: {name}", "", f"{equal} of {len(found)} ranks", ""


def main(quick: bool) -> None:
    names = QUICK if quick else list(CASES)
    runs = [Run("mlx", "tensor", 2), Run("torch", "tensor", 2), Run("mlx", "pipeline", 2)]
    if not quick:
        runs += [Run("mlx", "tensor", 3), Run("torch", "tensor", 3), Run("mlx", "pipeline", 3)]
    text = HEAD
    with tempfile.TemporaryDirectory() as scratch:
        folders = {backend: Path(scratch) / backend for backend in ("mlx", "torch")}
        make(folders["mlx"])
        shutil.copytree(folders["mlx"], folders["torch"])
        alone = {backend: work(folder, backend, None, names) for backend, folder in folders.items()}
        for run in runs:
            asked = QUICK if run.size > 2 else names
            text += "\n".join(table(run, folders[run.backend], alone[run.backend], asked)) + "\n"
            print(text)
            if not quick:
                # each run stands for itself
                RESULTS.write_text(text)


def table(run: Run, folder: Path, alone: dict[str, Any], names: list[str]) -> Iterator[str]:
    """What one run's processes found, against one process."""
    found = started(folder, run, names)
    model, _ = mlx_kvret.load(folder / "model", folder / "gates", backend=run.backend)
    again = dict(saved(model, folder, "alone"))
    yield f"\n## {run.backend}, {run.split}, {run.size} processes\n"
    yield "| case | compactions | heads' sets equal | logits differ by at most |"
    yield "|---|---|---|---|"
    for row in rows(alone, found, names):
        yield f"| {' | '.join(row)} |"
    for name, expected in again.items():
        who, what = name.split("-")
        equal = sum(one["saved"].get(name) == expected for one in found)
        yield f"| saved by {who}, opened by both: {what} |  | {equal} of {run.size} ranks |  |"


HEAD = f"""# Several processes against one

By `python benchmarks/ranks_equality.py`, on one machine: MLX over ring, torch over gloo. A Qwen2 of
random weights ({LAYERS} layers, {HEADS} KV heads, float32) reads {TOKENS} tokens in {len(CHUNKS)} passes,
chunks and single tokens, with a budget of {SIZES["budget"]} and a buffer of {SIZES["buffer"]}. After every
third pass the positions that each head holds are compared with one process's, on every rank the whole;
the least equal rank counts. Sums over ranks round otherwise in the last bit: entries whose scores are that
close may change places (with look-ahead they gather at its logarithm), and with few bits a value between two
codes may round to the other one. Nothing is timed.
"""

if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        place, backend, split = Path(sys.argv[2]), *sys.argv[3:5]
        result = work(place, backend, split, sys.argv[5:])
        rank = int(os.environ.get("MLX_RANK", os.environ.get("RANK", "0")))
        (place / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    else:
        main("--quick" in sys.argv[1:])
