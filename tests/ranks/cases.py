"""What is done alike in one process and in several, on either backend; and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mlx_kvret

CASES: dict[str, dict[str, Any]] = {
    "global": {},
    "layer": {"scope": "layer"},
    "head": {"scope": "head"},
    "protected": {"sinks": 2, "window": 5, "min_per_head": 3, "lookahead": 4},
    "threshold": {"threshold": 1e-3},
    "threshold of heads": {"threshold": 1e-3, "scope": "head"},
    "ties over all heads": {"policy": "recent", "scope": "global", "sinks": 1, "window": 2},
    "random": {"policy": "random", "scope": "global", "policy_seed": 5},
    "knorm": {"policy": "knorm", "scope": "layer"},
    "keydiff": {"policy": "keydiff", "scope": "global"},
    "full": {"policy": "full"},
    # of text alone, whose part is all of it
    "modality": {"scope": "modality", "picture_share": 0.25},
    "bits": {"kv_bits": "k8v4"},
    "bits of keys that are compared": {"kv_bits": 4, "policy": "keydiff", "scope": "layer"},
}
SIZES = {"budget": 12, "buffer": 4}
CHUNKS = [5, 1, 1, 1, 30, 2, 17, 1, 1, 1, 25, 1, 1, 8]
# no token twice, for in a first layer its keys would be equally long but for rounding
WORDS = 160
TEXT = [int(token) for token in np.random.default_rng(3).permutation(WORDS - 1)[: sum(CHUNKS)] + 1]


def read(model: Any, forward: Callable[..., np.ndarray], **options: Any) -> dict[str, Any]:
    """A text read in chunks: the last logits and the figures after each, and what is kept after some."""
    cache = mlx_kvret.make_cache(model, **SIZES | options)
    logits, kept, figures, start = [], [], [], 0
    for size in CHUNKS:
        logits.append(forward(TEXT[start : start + size], cache)[-1])
        start += size
        if len(logits) % 4 == 2:
            kept.append([[row.tolist() for row in layer] for layer in cache.kept_positions()])
        figures.append((cache.seen, cache.entries))
    return {"logits": np.array(logits), "kept": kept, "figures": figures}


def everything(
    model: Any, forward: Callable[..., np.ndarray], folder: Path, names: Sequence[str], batches: bool = True
) -> dict[str, Any]:
    """All of it: readings, a cache saved and one reopened, answers and a batch."""
    found: dict[str, Any] = {name: read(model, forward, **CASES[name]) for name in names}
    cache = mlx_kvret.make_cache(model, **SIZES)
    text = mlx_kvret.generate(model, None, TEXT[:60], cache=cache, max_tokens=14)
    found["text"] = text
    mlx_kvret.save_cache(model, cache, folder / "made.kv")
    draw = {"max_tokens": 6, "temp": 0.9, **SIZES}
    found["drawn"] = mlx_kvret.generate(model, None, TEXT[:20], **draw)
    found["seeded"] = mlx_kvret.generate(model, None, TEXT[:20], seed=3, **draw)
    if batches:
        prompts = [TEXT[:31], TEXT[:9], TEXT[5:60]]
        options = {"max_tokens": 8, "budget": [12, 8, 12], "buffer": 4}
        found["batch"] = mlx_kvret.generate_batch(model, None, prompts, **options)
        found["drawn batch"] = mlx_kvret.generate_batch(model, None, prompts, temp=0.9, **options)
    if "bits" in names:
        packed = mlx_kvret.make_cache(model, **SIZES | CASES["bits"])
        mlx_kvret.generate(model, None, TEXT[:61], cache=packed, max_tokens=2)
        mlx_kvret.save_cache(model, packed, folder / "made-bits.kv")
    for name in ("", "-bits"):
        if (folder / f"given{name}.kv").exists():
            given, _ = mlx_kvret.load_cache(model, folder / f"given{name}.kv")
            found[f"reopened{name}"] = [layer[0].tolist() for layer in given.kept_positions()]
            found[f"went on{name}"] = mlx_kvret.generate(model, None, TEXT[:3], cache=given, max_tokens=8)
    return found
